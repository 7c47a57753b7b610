// The types of a tensor's arrays: all of one format, or of formats that are selected at run time.
#pragma once

#include "cuda/mixed.cuh"
#include "cuda/mixed_row.cuh"
#include "cuda/vector.cuh"

namespace fusedopt::cuda {

// The place of a thread's elements in a row of kThreads vectors.
template <int kCount>
struct UniformRow {
  static constexpr int kVector = kCount;

  __device__ explicit UniformRow(Storage) {}

  __device__ int place() const { return computed_anew(static_cast<int>(threadIdx.x)) * kVector; }
  template <class Body>
  __device__ __forceinline__ void in_turn(int, Body&& body) const {
    body();
  }
};

// The types of a chunk's arrays that are all stored as scalar_t.
template <class scalar_t>
struct Uniform {
  using stored_t = scalar_t;  // of an element in a Vector
  using compute_t = opmath_t<scalar_t>;
  using param_slice = Slice<scalar_t>;
  using grad_slice = Slice<scalar_t>;
  using state_slice = Slice<scalar_t>;
  using row = UniformRow<vector_size<scalar_t>>;
  template <class Norm>
  using norm_lanes = Lanes<Norm, row::kVector, compute_t>;
  static constexpr bool is_mixed = false;
  static constexpr int kSingleStride = kThreads;
};

// The same for arrays of any formats that are computed in float32.
struct Mixed {
  using stored_t = float;
  using compute_t = float;
  using param_slice = MixedSlice<Part::kParam>;
  using grad_slice = MixedSlice<Part::kGrad>;
  using state_slice = MixedSlice<Part::kState>;
  using row = MixedRow;
  template <class Norm>
  using norm_lanes = SharedLanes<Norm>;
  static constexpr bool is_mixed = true;
  static constexpr int kSingleStride = kWarpSize;  // see blocks.cuh
};

// Calls body(Uniform<...>{}) or body(Mixed{}) for a tensor's arrays.
template <class Body>
__device__ __forceinline__ void visit_types(const TensorShape& shape, Body&& body) {
  bool is_uniform = shape.grad == shape.param;
#pragma unroll
  for (const Storage state : shape.states) is_uniform = is_uniform && state == shape.param;
  if (!is_uniform) return body(Mixed{});  // Layout refuses them beside float64
  visit_array(shape.param, [&](auto param) { body(Uniform<type_of<decltype(param)>>{}); });
}

// The same for single elements. One loop takes all formats but float64.
template <class Body>
__device__ __forceinline__ void visit_single_types(const TensorShape& shape, Body&& body) {
  if (shape.param == Storage::kFloat64) return body(Uniform<double>{});
  body(Mixed{});
}

}  // namespace fusedopt::cuda
