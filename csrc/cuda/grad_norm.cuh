// The norm pass: every chunk's sum of squares or largest magnitude; the last block to finish adds
// them up, or takes the largest.
#pragma once

#include "core/dispatch.h"
#include "cuda/arguments.cuh"
#include "cuda/block.cuh"
#include "cuda/segments.cuh"
#include "cuda/telemetry.cuh"
#include "cuda/vector.cuh"

namespace fusedopt::cuda {

template <class Norm, bool telemetry, class param_t, class grad_t>
__device__ GradMeasures measure_chunk(const void* grad, Chunk chunk, int size, Format format) {
  constexpr int kVector = vector_size<param_t>;
  constexpr int kRow = kThreads * kVector;
  constexpr int kRowsInFlight = 4;
  const Slice<grad_t> grads(grad, chunk.begin());
  const int aligned_size = grads.template aligned<kVector>() ? size : 0;
  GradMeter<Norm, grad_t, kVector> meter;
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
    for (int row = 0; row < kRowsInFlight; ++row) meter.add(rows[row], format, telemetry);
  }
#pragma unroll 1
  for (; first < size; first += kRow) {
    meter.add(grads.template load_some<kVector>(first, size), format, telemetry);
  }
  return meter.result(format);
}

// What one chunk adds to the norm; 0 where there is no gradient.
template <class Norm, bool detailed>
__device__ void measure_chunk(const StepParams& step, int64_t index) {
  const Chunk chunk = step.chunks[index];
  const TensorEntry& tensor = step.tensors[chunk.tensor];
  const void* grad = step.grads[chunk.tensor];
  if (grad == nullptr) {
    if (threadIdx.x == 0) step.chunk_sums[index] = 0;
    return;
  }
  GradMeasures mine{};
  visit_sizes(tensor, [&](auto types) {
    using param_t = typename decltype(types)::param_t;
    using grad_t = typename decltype(types)::grad_t;
    const int size = static_cast<int>(chunk.size(tensor.numel));
    mine = measure_chunk<Norm, detailed, param_t, grad_t>(grad, chunk, size, Format(tensor));
  });
  leave_grad_measures<Norm>(step, index, mine, detailed && step.telemetry.chunks != nullptr);
  if (detailed && step.own_clips.coefs != nullptr) measure_units(step, index);
}

// For telemetry, and clips of single tensors or units, it is a kernel of its own: without, it has
// no register to spare.
template <class Norm, bool detailed, size_t kBytes>
__global__ void __launch_bounds__(kThreads, detailed ? 3 : 4)
    grad_norm_kernel(const __grid_constant__ Arguments<kBytes> arguments) {
  arguments.leave();  // for the update pass
  const StepParams step = arguments.on_device();
  for (int64_t i = blockIdx.x; i < step.num_chunks; i += gridDim.x) {
    measure_chunk<Norm, detailed>(step, i);
  }
  if (!is_last_block(arguments.ticket)) return;
  if (detailed && step.own_clips.tensor_norms != nullptr) measure_tensors(step);
  const double sum = total<Norm>(step.chunk_sums, step.num_chunks);
  if (threadIdx.x == 0) step.control->sum_of_squares = sum;
}

}  // namespace fusedopt::cuda
