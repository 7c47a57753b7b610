// Exact sums by a warp or by a block: see core/exact_sum.h.
#pragma once

#include "core/exact_sum.h"
#include "cuda/block.cuh"

namespace fusedopt::cuda {

// Limbs in shared memory, one set per warp.
struct SharedLimbs {
  unsigned long long at[kLimbs];
};

__device__ inline SharedLimbs& limbs_of_warp(int warp) {
  __shared__ SharedLimbs limbs[kThreads / kWarpSize];
  return limbs[warp];
}

// One thread's share of an exact sum. Numbers of similar magnitude are added in registers.
class ExactShare {
 public:
  __device__ explicit ExactShare(SharedLimbs& limbs) : limbs_(limbs) {}

  __device__ void add(double number) {
    if (!is_finite(number)) {
      nonfinite_ += number;
      return;
    }
    const LimbParts it(number);
    if (it.first != first_) flush();
    first_ = it.first;
#pragma unroll
    for (int k = 0; k < 3; ++k) parts_[k] += it.parts[k];
  }

  // Adds the registers to the limbs.
  __device__ void flush() {
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if (parts_[k] != 0) atomicAdd(&limbs_.at[first_ + k], parts_[k]);
      parts_[k] = 0;
    }
  }

  __device__ double nonfinite() const { return nonfinite_; }

 private:
  SharedLimbs& limbs_;
  int first_ = 0;
  unsigned long long parts_[3] = {};
  double nonfinite_ = 0;
};

// The exact sum of value(0) ... value(count - 1). All threads of a warp call it; lane 0 gets it.
template <class Value>
__device__ double warp_exact_total(int64_t count, Value value) {
  const int lane = threadIdx.x % kWarpSize;
  SharedLimbs& limbs = limbs_of_warp(threadIdx.x / kWarpSize);
  for (int i = lane; i < kLimbs; i += kWarpSize) limbs.at[i] = 0;
  __syncwarp();
  ExactShare share(limbs);
  for (int64_t i = lane; i < count; i += kWarpSize) share.add(value(i));
  share.flush();
  const double nonfinite = warp_total<SumOfSquares>(share.nonfinite());
  __syncwarp();
  double result = nonfinite;
  if (lane == 0 && nonfinite == 0) result = round_limbs(limbs.at);
  __syncwarp();  // the next call may overwrite the limbs
  return result;
}

// The exact sum of value(0) ... value(count - 1). All threads of a block call it; thread 0 gets it.
template <class Value>
__device__ double block_exact_total(int64_t count, Value value) {
  SharedLimbs& limbs = limbs_of_warp(0);
  for (int i = threadIdx.x; i < kLimbs; i += kThreads) limbs.at[i] = 0;
  __syncthreads();
  ExactShare share(limbs);
  for (int64_t i = threadIdx.x; i < count; i += kThreads) share.add(value(i));
  share.flush();
  double result = block_total<SumOfSquares>(share.nonfinite());  // has barriers of its own
  if (threadIdx.x == 0 && result == 0) result = round_limbs(limbs.at);
  __syncthreads();  // the next call may overwrite the limbs
  return result;
}

// The exact sum of all chunks that count; thread 0 gets it. Other blocks have written the chunks'
// sums: the loads go past the L1 cache.
__device__ inline double exact_total_of_chunks(const StepParams& step) {
  return block_exact_total(step.num_chunks, [&](int64_t chunk) {
    return counted_sum(step, chunk, __ldcg(step.chunk_sums + chunk));
  });
}

}  // namespace fusedopt::cuda
