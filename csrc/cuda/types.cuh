// The types that the kernels are compiled for. The kernels select the 16-bit format, and the states
// that a rule uses, at run time: memory bounds them, so that a few more instructions cost little.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/params.h"

namespace fusedopt {

// Stands for bfloat16 and for float16.
struct raw16 {
  uint16_t bits;
};
template <>
struct opmath<raw16> {
  using type = float;
};

namespace cuda {

// The format of a tensor's 16-bit elements.
struct Format {
  bool is_bfloat16;

  __device__ explicit Format(const TensorShape& shape) : is_bfloat16(!is_float16(shape.param)) {}

  // Calls body(bfloat16{}) or body(float16{}) if scalar_t is raw16, else body(scalar_t{}). The body
  // converts several elements, so that the format is tested once for all of them.
  template <class scalar_t, class Body>
  __device__ __forceinline__ void visit(Body&& body) const {
    if constexpr (!std::is_same_v<scalar_t, raw16>) {
      body(scalar_t{});
    } else if (is_bfloat16) {
      body(bfloat16{});
    } else {
      body(float16{});
    }
  }

  template <class scalar_t>
  __device__ opmath_t<scalar_t> widen(scalar_t value) const {
    if constexpr (std::is_same_v<scalar_t, raw16>) {
      return is_bfloat16 ? fusedopt::widen(bfloat16{value.bits})
                         : fusedopt::widen(float16{value.bits});
    } else {
      return value;
    }
  }
};

// Calls body(Tag<scalar_t>{}) for an array's storage.
template <class Body>
__device__ __forceinline__ void visit_array(Storage storage, Body&& body) {
  visit_storage<raw16, raw16>(storage, body);
}

}  // namespace cuda

}  // namespace fusedopt
