// How an array's elements are stored, and the type that they are computed in.
#pragma once

#include <cstdint>
#include <type_traits>

#include "math/convert.h"
#include "math/inline.h"

namespace fusedopt {

// A stochastic array is rounded at random: see math/random.h. The elements of a master have a rest
// in a second array: 16 more bits if the master is exact, or 8, for 24 bits together. See
// math/split.h. Arrays of 8 bits have a scale per block in a second array: see math/blocks.h.
enum class Storage : uint8_t {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kBFloat16Stochastic,
  kFloat16Stochastic,
  kBFloat16Exact,
  kFloat16Exact,
  kBFloat16In24Bits,
  kFloat16In24Bits,
  kLinear8,
  kRoot8,
  kRoot8Stochastic
};

FUSEDOPT_INLINE constexpr bool is_float16(Storage storage) {
  return storage == Storage::kFloat16 || storage == Storage::kFloat16Stochastic ||
         storage == Storage::kFloat16Exact || storage == Storage::kFloat16In24Bits;
}
FUSEDOPT_INLINE constexpr bool is_stochastic(Storage storage) {
  return storage == Storage::kBFloat16Stochastic || storage == Storage::kFloat16Stochastic ||
         storage == Storage::kRoot8Stochastic;
}
FUSEDOPT_INLINE constexpr bool is_exact(Storage storage) {
  return storage == Storage::kBFloat16Exact || storage == Storage::kFloat16Exact;
}
FUSEDOPT_INLINE constexpr bool is_24_bits(Storage storage) {
  return storage == Storage::kBFloat16In24Bits || storage == Storage::kFloat16In24Bits;
}
FUSEDOPT_INLINE constexpr bool is_root(Storage storage) {
  return storage == Storage::kRoot8 || storage == Storage::kRoot8Stochastic;
}
FUSEDOPT_INLINE constexpr bool is_in_blocks(Storage storage) {
  return storage == Storage::kLinear8 || is_root(storage);
}
// Of an element's rest; 0 if it has none.
FUSEDOPT_INLINE constexpr int rest_bytes(Storage storage) {
  return is_exact(storage) ? 2 : is_24_bits(storage) ? 1 : 0;
}

// An array of a tensor.
struct Array {
  void* data;
  void* second;  // of a master: its rest, int16 or int8 per element; of an array of 8 bits: its
                 // scales, float32 per block; else null
  Storage storage;
  int random_shift;  // stochastic rounding takes 16 of an element's 32 random bits, from here on
};
// One random number serves the states and the parameter.
inline constexpr int kStateShift = 0, kParamShift = 16;

// Of an element in an array's main memory.
FUSEDOPT_INLINE constexpr int64_t bytes_of(Storage storage) {
  switch (storage) {
    case Storage::kFloat32:
      return 4;
    case Storage::kFloat64:
      return 8;
    case Storage::kBFloat16:
    case Storage::kFloat16:
    case Storage::kBFloat16Stochastic:
    case Storage::kFloat16Stochastic:
    case Storage::kBFloat16Exact:
    case Storage::kFloat16Exact:
    case Storage::kBFloat16In24Bits:
    case Storage::kFloat16In24Bits:
      return 2;
    case Storage::kLinear8:
    case Storage::kRoot8:
    case Storage::kRoot8Stochastic:
      return 1;
  }
  return 0;  // no storage
}

// Arrays of 16 and 8 bits are computed in float32, float64 in float64.
FUSEDOPT_INLINE Storage computed_in(Storage storage) {
  return storage == Storage::kFloat64 ? Storage::kFloat64 : Storage::kFloat32;
}

// A type wrapped in a value, for generic lambdas.
template <class scalar_t>
struct Tag {
  using type = scalar_t;
};
template <class tag>
using type_of = typename tag::type;

// Calls body(Tag<scalar_t>{}) with the type of this storage's main memory. Arrays of 8 bits have
// none. A backend that selects the 16-bit format at run time passes one type for both formats.
template <class bfloat16_t = bfloat16, class float16_t = float16, class Body>
FUSEDOPT_INLINE auto visit_storage(Storage storage, Body&& body) {
  switch (storage) {
    case Storage::kFloat32:
      return body(Tag<float>{});
    case Storage::kFloat64:
      return body(Tag<double>{});
    case Storage::kFloat16:
    case Storage::kFloat16Stochastic:
    case Storage::kFloat16Exact:
    case Storage::kFloat16In24Bits:
      if constexpr (!std::is_same_v<bfloat16_t, float16_t>) return body(Tag<float16_t>{});
      [[fallthrough]];
    case Storage::kBFloat16:
    case Storage::kBFloat16Stochastic:
    case Storage::kBFloat16Exact:
    case Storage::kBFloat16In24Bits:
      return body(Tag<bfloat16_t>{});
    case Storage::kLinear8:
    case Storage::kRoot8:
    case Storage::kRoot8Stochastic:
      break;
  }
  __builtin_unreachable();  // Layout refuses them
}

// The same for the gradient of a parameter of type param_t. It is stored as param_t, or as the type
// that the parameter is computed in.
template <class param_t, class Body>
FUSEDOPT_INLINE auto visit_storage_beside(Storage storage, Body&& body) {
  if constexpr (!std::is_same_v<param_t, opmath_t<param_t>>) {
    if (storage == Storage::kFloat32) return body(Tag<opmath_t<param_t>>{});
  }
  return body(Tag<param_t>{});
}

// Whether visit_storage_beside() has a type for a gradient.
FUSEDOPT_INLINE bool can_be_grad(Storage param, Storage grad) {
  if (grad == computed_in(param)) return true;
  return (grad == Storage::kBFloat16 || grad == Storage::kFloat16) &&
         computed_in(param) == Storage::kFloat32 && bytes_of(param) == bytes_of(grad) &&
         is_float16(param) == is_float16(grad);
}

// Whether a parameter can be of this storage.
FUSEDOPT_INLINE bool can_be_param(Storage param) {
  return bytes_of(param) > 0 && !is_in_blocks(param);
}

// Whether a state can be of this storage. Only parameters have a rest.
FUSEDOPT_INLINE bool can_be_state(Storage param, Storage state) {
  return computed_in(state) == computed_in(param) && rest_bytes(state) == 0;
}

}  // namespace fusedopt
