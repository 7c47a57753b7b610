// The norm pass: every chunk's sum of squares or largest magnitude; the last block to finish adds
// them up, or takes the largest.
#pragma once

#include "../dispatch.h"
#include "arguments.cuh"
#include "block.cuh"
#include "vector.cuh"

namespace fusedopt::cuda {

template <class Norm, class param_t, class grad_t>
__device__ double chunk_norm(const void* grad, Chunk chunk, int size, Converter convert) {
  constexpr int kVector = vector_size<param_t>;
  constexpr int kRow = kThreads * kVector;
  constexpr int kRowsInFlight = 4;
  const Stretch<grad_t> grads(grad, chunk.begin());
  const int aligned_size = grads.template aligned<kVector>() ? size : 0;
  Lanes<Norm, kVector> lanes;
  int first = threadIdx.x * kVector;
#pragma unroll 1
  for (; first + (kRowsInFlight - 1) * kRow + kVector <= aligned_size;
       first += kRowsInFlight * kRow) {
    Vector<grad_t, kVector> rows[kRowsInFlight];
#pragma unroll
    for (int row = 0; row < kRowsInFlight; ++row) {
      rows[row] = grads.template load<kVector>(first + row * kRow);
    }
#pragma unroll
    for (int row = 0; row < kRowsInFlight; ++row) lanes.add(rows[row], convert);
  }
#pragma unroll 1
  for (; first < size; first += kRow)
    lanes.add(grads.template load_some<kVector>(first, size), convert);
  return block_total<Norm>(lanes.at);
}

// What one chunk adds to the norm, in thread 0; 0 where there is no gradient.
template <class Norm>
__device__ double chunk_norm(const Pass& pass, Chunk chunk) {
  const TensorEntry& tensor = pass.tensors[chunk.tensor];
  const void* grad = pass.grads[chunk.tensor];
  double result = 0;
  if (grad == nullptr) return result;
  visit_sizes(tensor, [&](auto types) {
    using param_t = typename decltype(types)::param_t;
    using grad_t = typename decltype(types)::grad_t;
    const int size = static_cast<int>(chunk.size(tensor.numel));
    result = chunk_norm<Norm, param_t, grad_t>(grad, chunk, size, Converter(tensor));
  });
  return result;
}

template <class Norm, size_t kBytes>
__global__ void __launch_bounds__(kThreads, 4)
    grad_norm_kernel(const __grid_constant__ Arguments<kBytes> arguments) {
  arguments.leave();  // for the update pass
  const Pass pass = arguments.on_device();
  for (int64_t i = blockIdx.x; i < pass.num_chunks; i += gridDim.x) {
    const double sum = chunk_norm<Norm>(pass, pass.chunks[i]);
    if (threadIdx.x == 0) pass.chunk_sums[i] = sum;
  }
  if (!is_last_block(arguments.ticket)) return;
  const double sum = total<Norm>(pass.chunk_sums, pass.num_chunks);
  if (threadIdx.x == 0) pass.control->sum_of_squares = sum;
}

}  // namespace fusedopt::cuda
