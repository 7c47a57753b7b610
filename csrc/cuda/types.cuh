// The types that the kernels are compiled for. Memory is what bounds them: which of the two 16-bit
// formats it is, and which states a rule uses, they find out as they run.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dispatch.h"

namespace fusedopt {

// A bfloat16 or a float16.
struct raw16 {
  uint16_t bits;
};
template <>
struct opmath<raw16> {
  using type = float;
};

namespace cuda {

// Which of the two formats a tensor's elements of 16 bits have.
struct Format {
  bool is_bfloat16;

  __device__ explicit Format(const TensorEntry& tensor)
      : is_bfloat16(tensor.param_dtype == Dtype::kBFloat16) {}

  // Calls body(bfloat16{}) or body(float16{}) if scalar_t is raw16, else body(scalar_t{}): one
  // question for as many elements as the body converts.
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

// Calls body(Types<...>{}) for a tensor's dtypes.
template <class Body>
__device__ __forceinline__ void visit_sizes(const TensorEntry& tensor, Body&& body) {
  if (tensor.param_dtype == Dtype::kFloat32) return body(Types<float, float, float>{});
  if (tensor.param_dtype == Dtype::kFloat64) return body(Types<double, double, double>{});
  visit_16_bits<raw16>(tensor.grad_dtype != tensor.param_dtype,
                       tensor.state_dtype != tensor.param_dtype, body);
}

}  // namespace cuda

}  // namespace fusedopt
