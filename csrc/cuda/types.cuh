// The types that the kernels are compiled for. Memory is what bounds them: which of the two 16-bit
// formats it is, and which states a rule uses, they find out as they run.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../dispatch.h"

namespace fusedopt {

// A bfloat16 or a float16.
struct either16 {
  uint16_t bits;
};
template <>
struct opmath<either16> {
  using type = float;
};

namespace cuda {

// widen() and narrow() of ../math/convert.h, for a tensor's dtypes.
struct Converter {
  bool is_bfloat16;

  __device__ explicit Converter(const TensorEntry& tensor)
      : is_bfloat16(tensor.param_dtype == Dtype::kBFloat16) {}

  template <class scalar_t>
  __device__ opmath_t<scalar_t> widen(scalar_t value) const {
    if constexpr (std::is_same_v<scalar_t, either16>) {
      return is_bfloat16 ? fusedopt::widen(bfloat16{value.bits})
                         : fusedopt::widen(float16{value.bits});
    } else {
      return value;
    }
  }

  template <class scalar_t>
  __device__ scalar_t narrow(opmath_t<scalar_t> value) const {
    if constexpr (std::is_same_v<scalar_t, either16>) {
      return {is_bfloat16 ? fusedopt::narrow<bfloat16>(value).bits
                          : fusedopt::narrow<float16>(value).bits};
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
  visit_16_bits<either16>(tensor.grad_dtype != tensor.param_dtype,
                          tensor.state_dtype != tensor.param_dtype, body);
}

}  // namespace cuda

}  // namespace fusedopt
