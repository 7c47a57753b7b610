// The update pass. If the step is skipped, it updates no chunk. The last block ends the step: see
// core/finish.h. A rule with a trust ratio has a pass before: see core/trust.h. Its last block
// computes the ratios.
#pragma once

#include "core/finish.h"
#include "core/trust.h"
#include "cuda/arguments.cuh"
#include "cuda/block.cuh"
#include "cuda/chunk_update.cuh"
#include "cuda/segments.cuh"
#include "cuda/telemetry.cuh"
#include "cuda/workers.cuh"

namespace fusedopt::cuda {

// Leaves the clip coefficients of a chunk. All its elements have one, if it is not clipped, or if
// no segments are. (A branch within SegmentCoefs would take more registers than there are.)
template <class Rule>
__device__ __forceinline__ void leave_coefs(const StepParams& step, Chunk chunk, int index,
                                            Shared<Rule>& shared) {
  if (step.chunk_coefs != nullptr && !is_unclipped(step, chunk.tensor)) {
    return SegmentCoefs(step, shared.decision, index).leave(shared.segments);
  }
  if (threadIdx.x != 0) return;
  const double coef = is_unclipped(step, chunk.tensor) ? 1.0 : shared.decision.clip_coef;
  if (step.chunk_coefs != nullptr) step.chunk_coefs[index] = coef;
  shared.segments.is_shared = true;
  shared.segments.factor = shared.decision.inv_scale * coef;
}

// Updates the elements of a chunk that its vectors leave: see ChunkUpdate.
template <class Rule>
__device__ __forceinline__ void update_rest(const StepParams& step, Chunk chunk, int done,
                                            CoefficientCache<Rule>& cache, Shared<Rule>& shared) {
  const TensorShape& shape = step.shapes[chunk.tensor];
  if (done >= chunk.size(shape.numel)) return;
  __syncthreads();  // the vectors' pointers are read no more
  visit_single_types(shape, [&](auto types) {
    ChunkUpdate<Rule, decltype(types)>(step, chunk, cache, shared).update_singles(done);
  });
}

// Updates a chunk. Also measures its gradients, if no pass has measured them before. Returns the
// index again.
template <class Rule>
__device__ __forceinline__ int update_chunk(StepParams& step, int index,
                                            CoefficientCache<Rule>& cache, Shared<Rule>& shared) {
  const Chunk chunk = step.chunks[index];
  const bool measures = measures_grads<Rule>(step);
  const bool telemetry = step.chunk_measures != nullptr;
  if (step.grads[chunk.tensor] == nullptr) {
    if (measures && threadIdx.x == 0) step.chunk_sums[index] = 0;
    return index;
  }
  __syncthreads();
  if (reads_grads<Rule> && shared.has_own_coefs) leave_coefs(step, chunk, index, shared);
  if (threadIdx.x == 0) {
    shared.index = index;
    const ChunkSegments& segments = shared.segments;
    const bool uniform = segments.is_uniform(step.shapes[chunk.tensor]);
    cache.prepare_for(step, chunk, uniform ? segments.factor : 1.0);
  }
  __syncthreads();
  GradMeasures mine{};
  int done = 0;
  visit_types(step.shapes[chunk.tensor], [&](auto types) {
    done = ChunkUpdate<Rule, decltype(types)>(step, chunk, cache, shared).run(mine);
  });
  index = shared.index;
  step.grads = shared.grads;
  step.groups = shared.groups;
  if (measures) leave_grad_measures<SumOfSquares>(step, index, mine, telemetry);
  update_rest(step, step.chunks[index], done, cache, shared);
  if (Rule::kIsTrustPass || telemetry) leave_squares<Rule>(step, index, shared.lanes);
  return index;
}

// Updates the chunks of a block. In reverse order: the gradients that the pass before has read last
// are still in the cache. A pass after that one goes forward.
template <class Rule>
__device__ __forceinline__ void update_chunks(StepParams& step, Shared<Rule>& shared) {
  constexpr bool kForward = Rule::kHasTrustRatio && !Rule::kIsTrustPass;
  auto& cache = *reinterpret_cast<CoefficientCache<Rule>*>(shared.cache);
  if (threadIdx.x == 0) {
    shared.decision = decide(step.options, step.options.measure ? step.control->sum_of_squares : 0);
    shared.segments.begin(shared.decision);
    shared.grads = step.grads;
    shared.groups = step.groups;
    shared.has_own_coefs = step.chunk_coefs != nullptr || step.has_unclipped;
    cache.group = UINT32_MAX;
  }
  __syncthreads();
  const int last = static_cast<int>(step.num_chunks) - 1;
  for (int i = last - static_cast<int>(blockIdx.x); i >= 0 && !shared.decision.skip;) {
    const int index = update_chunk(step, kForward ? last - i : i, cache, shared);
    i = (kForward ? last - index : index) - static_cast<int>(gridDim.x);
  }
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, 2)
    update_kernel(const __grid_constant__ Arguments<kInlinedArgs> arguments) {
  __shared__ Shared<Rule> shared;
  StepParams step = arguments.on_device();
  update_chunks(step, shared);
  if (is_last_block(&step.tickets[1])) {
    finish<Rule>(step, shared.decision, BlockWorkers{shared.values});
  }
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, 2)
    trust_kernel(const __grid_constant__ Arguments<kInlinedArgs> arguments) {
  __shared__ Shared<TrustPass<Rule>> shared;
  StepParams step = arguments.on_device();
  update_chunks(step, shared);
  if (is_last_block(&step.tickets[2]) && !shared.decision.skip) {
    leave_trust_ratios<Rule>(step, BlockWorkers{shared.values});
  }
}

}  // namespace fusedopt::cuda
