// The message of a step over ranks, written and read on the device: see core/message.h.
#pragma once

#include "core/message.h"
#include "cuda/exact_sum.cuh"

namespace fusedopt::cuda {

struct MessageArguments {
  const double* chunk_sums;
  const bool* counted;
  int64_t num_chunks;
  int64_t* message;
  const int64_t* total;
  StepControl* control;
  float* skip;
};

// Adds the sums of chunks to the message. One block.
__global__ void __launch_bounds__(kThreads)
    write_message_kernel(const __grid_constant__ MessageArguments it) {
  __shared__ unsigned long long infs, nans;
  SharedLimbs& limbs = limbs_of_warp(0);
  for (int i = threadIdx.x; i < kLimbs; i += kThreads) limbs.at[i] = 0;
  if (threadIdx.x == 0) infs = nans = 0;
  __syncthreads();
  ExactShare share(limbs);
  for (int64_t i = threadIdx.x; i < it.num_chunks; i += kThreads) {
    const double sum = it.chunk_sums[i];
    // Also of what is counted elsewhere: a copy that is broken here makes all ranks skip.
    if (!is_finite(sum)) {
      atomicAdd(sum == sum ? &infs : &nans, 1ull);
    } else if (it.counted[i]) {
      share.add(sum);
    }
  }
  share.flush();
  __syncthreads();
  for (int i = threadIdx.x; i < kLimbs; i += kThreads) {
    it.message[i] += static_cast<int64_t>(limbs.at[i]);
  }
  if (threadIdx.x == 0) {
    it.message[kInfs] += static_cast<int64_t>(infs);
    it.message[kNans] += static_cast<int64_t>(nans);
  }
}

__global__ void __launch_bounds__(kThreads)
    read_message_kernel(const __grid_constant__ MessageArguments it) {
  __shared__ uint64_t limbs[kLimbs];
  for (int i = threadIdx.x; i < kLimbs; i += kThreads) {
    limbs[i] = static_cast<uint64_t>(it.total[i]);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  fusedopt::read_message(it.total, limbs, &it.control->sum_of_squares, it.skip);
}

}  // namespace fusedopt::cuda
