// The norm pass: measures the sum of squares of every chunk, or its largest magnitude. The last
// block that finishes combines them.
#pragma once

#include "core/dispatch.h"
#include "cuda/arguments.cuh"
#include "cuda/block.cuh"
#include "cuda/exact_sum.cuh"
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

// Measures one chunk, and writes its entry in chunk_sums: 0 if there is no gradient.
template <class Norm, bool detailed>
__device__ void measure_chunk(const StepParams& step, int64_t index) {
  const Chunk chunk = step.chunks[index];
  const TensorShape& shape = step.shapes[chunk.tensor];
  const void* grad = step.grads[chunk.tensor];
  if (grad == nullptr) {
    if (threadIdx.x == 0) step.chunk_sums[index] = 0;
    return;
  }
  GradMeasures mine{};
  visit_array(shape.param, [&](auto param) {
    using param_t = type_of<decltype(param)>;
    visit_storage_beside<param_t>(shape.grad, [&](auto stored) {
      const int size = static_cast<int>(chunk.size(shape.numel));
      mine = measure_chunk<Norm, detailed, param_t, type_of<decltype(stored)>>(grad, chunk, size,
                                                                               Format(shape));
    });
  });
  leave_grad_measures<Norm>(step, index, mine, detailed && step.chunk_measures != nullptr);
  if (detailed && step.part_sums != nullptr) measure_parts(step, index);
}

// Combines the entries of chunk_sums. One block calls it, after all chunks are measured.
template <class Norm>
__device__ void reduce_chunks(const StepParams& step) {
  double result = 0;
  if constexpr (std::is_same_v<Norm, SumOfSquares>) {
    result = exact_total_of_chunks(step);
  } else {
    for (int64_t i = threadIdx.x; i < step.num_chunks; i += kThreads) {
      result = Norm::combine(result, __ldcg(step.chunk_sums + i));
    }
    result = block_total<Norm>(result);
  }
  if (threadIdx.x == 0) step.control->sum_of_squares = result;
}

// `detailed`: a separate kernel for telemetry and for limits of rows. The plain kernel has no
// registers left for them.
template <class Norm, bool detailed, int64_t kBytes>
__global__ void __launch_bounds__(kThreads, detailed ? 3 : 4)
    grad_norm_kernel(const __grid_constant__ Arguments<kBytes> arguments) {
  arguments.spill_args();
  const StepParams step = arguments.on_device();
  for (int64_t i = blockIdx.x; i < step.num_chunks; i += gridDim.x) {
    measure_chunk<Norm, detailed>(step, i);
  }
  if (arguments.reduces && is_last_block(&step.tickets[0])) reduce_chunks<Norm>(step);
}

template <class Norm>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const __grid_constant__ Arguments<kInlinedArgs> arguments) {
  reduce_chunks<Norm>(arguments.on_device());
}

}  // namespace fusedopt::cuda
