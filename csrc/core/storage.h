// How an array's elements are stored, and the type that they are computed in.
#pragma once

#include <cstdint>
#include <type_traits>

#include "math/convert.h"
#include "math/inline.h"

namespace fusedopt {

enum class Storage : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

FUSEDOPT_INLINE constexpr int64_t bytes_of(Storage storage) {
  switch (storage) {
    case Storage::kFloat32:
      return 4;
    case Storage::kFloat64:
      return 8;
    case Storage::kBFloat16:
    case Storage::kFloat16:
      return 2;
  }
  return 0;  // no storage
}

// Arrays of 16 bits are computed in float32, float64 in float64.
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

// Calls body(Tag<scalar_t>{}) with the type of this storage. A backend that selects the 16-bit
// format at run time passes one type for both formats.
template <class bfloat16_t = bfloat16, class float16_t = float16, class Body>
FUSEDOPT_INLINE auto visit_storage(Storage storage, Body&& body) {
  switch (storage) {
    case Storage::kFloat32:
      return body(Tag<float>{});
    case Storage::kFloat64:
      return body(Tag<double>{});
    case Storage::kFloat16:
      if constexpr (!std::is_same_v<bfloat16_t, float16_t>) return body(Tag<float16_t>{});
      [[fallthrough]];
    case Storage::kBFloat16:
      return body(Tag<bfloat16_t>{});
  }
  __builtin_unreachable();  // Layout refuses other values
}

// The same for a gradient or a state of a parameter of type param_t. Such an array is stored as
// param_t, or as the type that the parameter is computed in.
template <class param_t, class Body>
FUSEDOPT_INLINE auto visit_storage_beside(Storage storage, Body&& body) {
  if constexpr (!std::is_same_v<param_t, opmath_t<param_t>>) {
    if (storage == Storage::kFloat32) return body(Tag<opmath_t<param_t>>{});
  }
  return body(Tag<param_t>{});
}

// Whether visit_storage_beside() has a type for it.
FUSEDOPT_INLINE bool can_stand_beside(Storage param, Storage storage) {
  return storage == param || storage == computed_in(param);
}

}  // namespace fusedopt
