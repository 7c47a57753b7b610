// The statistics of a limit that adapts itself, on the device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/params.h"
#include "cuda/block.cuh"

namespace fusedopt::cuda {

// By a block: takes a step's norms in.
__device__ inline void observe(const StepParams& step, const Decision& decision) {
  const AdaptiveClip& clip = step.options.clip;
  const double norm = decision.grad_norm;
  if (clip.kind == ClipKind::kPerTensor) {
    for (int64_t t = threadIdx.x; t < step.num_tensors; t += kThreads) {
      observe_tensor(step, decision, t);
    }
  }
  if (clip.kind == ClipKind::kZScore) {
    if (threadIdx.x == 0) ZScore(clip).observe(norm);
    return;
  }
  if (clip.kind != ClipKind::kPercentile) return;
  const Percentile percentile(clip);
  __shared__ double lower, upper;
  if (threadIdx.x == 0) percentile.observe(norm);
  __syncthreads();
  // A norm's place, were they sorted, is the number of those before it. Equal ones stay in order.
  const double* const norms = percentile.norms();
  const int64_t size = percentile.size();
  const int64_t place = percentile.rank(), next = std::min(place + 1, size - 1);
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    int64_t before = 0;
    for (int64_t k = 0; k < size; ++k) {
      before += norms[k] < norms[i] || (norms[k] == norms[i] && k < i) ? 1 : 0;
    }
    if (before == place) lower = norms[i];
    if (before == next) upper = norms[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) percentile.set_limit(lower, upper);
}

}  // namespace fusedopt::cuda
