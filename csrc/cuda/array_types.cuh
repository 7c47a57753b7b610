// The types of a tensor's arrays: all of one format, or of formats that are selected at run time.
#pragma once

#include "cuda/mixed.cuh"
#include "cuda/vector.cuh"

namespace fusedopt::cuda {

// The types of a chunk's arrays that are all stored as scalar_t.
template <class scalar_t>
struct Uniform {
  using stored_t = scalar_t;  // of an element in a Vector
  using compute_t = opmath_t<scalar_t>;
  using param_slice = Slice<scalar_t>;
  using grad_slice = Slice<scalar_t>;
  using state_slice = Slice<scalar_t>;
  template <class Norm, int kVector>
  using norm_lanes = Lanes<Norm, kVector, compute_t>;
  static constexpr int kParamBytes = sizeof(scalar_t);
  static constexpr bool is_mixed = false;
  static constexpr int kSingleStride = kThreads;
};

// The same for arrays of several formats that are computed in float32.
template <int kBytes>
struct Mixed {
  using stored_t = float;
  using compute_t = float;
  using param_slice = MixedSlice<kBytes == sizeof(raw16) ? Part::kParam16 : Part::kParam32>;
  using grad_slice = MixedSlice<Part::kGrad>;
  using state_slice = MixedSlice<Part::kState>;
  template <class Norm, int kVector>
  using norm_lanes = SharedLanes<Norm, kVector>;
  static constexpr int kParamBytes = kBytes;
  static constexpr bool is_mixed = true;
  static constexpr int kSingleStride = kWarpSize;  // see blocks.cuh
};

// Calls body(Uniform<...>{}) or body(Mixed<...>{}) for a tensor's arrays.
template <class Body>
__device__ __forceinline__ void visit_types(const TensorShape& shape, Body&& body) {
  bool is_uniform = shape.grad == shape.param;
#pragma unroll
  for (const Storage state : shape.states) is_uniform = is_uniform && state == shape.param;
  visit_array(shape.param, [&](auto param) {
    using param_t = type_of<decltype(param)>;
    if constexpr (sizeof(opmath_t<param_t>) == sizeof(float)) {
      if (!is_uniform) return body(Mixed<sizeof(param_t)>{});
    }
    body(Uniform<param_t>{});
  });
}

}  // namespace fusedopt::cuda
