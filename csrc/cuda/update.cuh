// The update pass. If the step is skipped, it updates no chunk. The last block ends the step: see
// core/finish.h.
#pragma once

#include "core/finish.h"
#include "cuda/arguments.cuh"
#include "cuda/block.cuh"
#include "cuda/chunk_update.cuh"
#include "cuda/segments.cuh"
#include "cuda/telemetry.cuh"
#include "cuda/workers.cuh"

namespace fusedopt::cuda {

template <class Rule>
struct Shared {
  Decision decision;
  ChunkSegments segments;
  UpdateLanes lanes;
  float norm_lanes[kRowBytes / sizeof(raw16)];  // see SharedLanes
  double values[2];                             // for BlockWorkers
  // No register keeps these while a chunk is updated.
  int index;  // of the chunk
  const void* const* grads;
  const Group* groups;
  MixedPointers pointers;
  // Raw storage: __shared__ objects can't have constructors.
  alignas(8) unsigned char cache[sizeof(CoefficientCache<Rule>)];
};

// Updates a chunk. Also measures its gradients, if no pass has measured them before. Returns the
// index again.
template <class Rule>
__device__ __forceinline__ int update_chunk(StepParams& step, int index,
                                            CoefficientCache<Rule>& cache, Shared<Rule>& shared) {
  const Chunk chunk = step.chunks[index];
  const bool measures = !step.options.measure;
  const bool telemetry = step.chunk_measures != nullptr;
  if (step.grads[chunk.tensor] == nullptr) {
    if (measures && threadIdx.x == 0) step.chunk_sums[index] = 0;
    return index;
  }
  __syncthreads();
  if (step.chunk_coefs != nullptr || step.has_unclipped)
    SegmentCoefs(step, shared.decision, index).leave(shared.segments);
  if (threadIdx.x == 0) {
    shared.index = index;
    const ChunkSegments& segments = shared.segments;
    const bool uniform = segments.is_uniform(step.shapes[chunk.tensor]);
    cache.prepare_for(step, chunk, uniform ? segments.factor : 1.0);
  }
  __syncthreads();
  GradMeasures mine{};
  visit_types(step.shapes[chunk.tensor], [&](auto types) {
    ChunkUpdate<Rule, decltype(types)> update(step, chunk, cache, shared.segments, shared.lanes,
                                              shared.norm_lanes, shared.pointers);
    mine = update.run();
  });
  index = shared.index;
  step.grads = shared.grads;
  step.groups = shared.groups;
  if (measures) leave_grad_measures<SumOfSquares>(step, index, mine, telemetry);
  if (telemetry) leave_update_measures(step, index, shared.lanes);
  return index;
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, 2)
    update_kernel(const __grid_constant__ Arguments<kInlinedArgs> arguments) {
  __shared__ Shared<Rule> shared;
  auto& cache = *reinterpret_cast<CoefficientCache<Rule>*>(shared.cache);
  StepParams step = arguments.on_device();
  if (threadIdx.x == 0) {
    shared.decision = decide(step.options, step.options.measure ? step.control->sum_of_squares : 0);
    shared.segments.begin(shared.decision);
    shared.grads = step.grads;
    shared.groups = step.groups;
    cache.group = UINT32_MAX;
  }
  __syncthreads();
  // In reverse order: the gradients that the norm pass has read last are still in the cache.
  for (int i = static_cast<int>(step.num_chunks) - 1 - static_cast<int>(blockIdx.x);
       i >= 0 && !shared.decision.skip;) {
    i = update_chunk(step, i, cache, shared) - static_cast<int>(gridDim.x);
  }
  if (is_last_block(&step.tickets[1])) {
    finish<Rule>(step, shared.decision, BlockWorkers{shared.values});
  }
}

}  // namespace fusedopt::cuda
