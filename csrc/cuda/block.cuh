// What the threads of a block do together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../params.h"

namespace fusedopt::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kThreads == kTotalLanes, "a thread holds one lane of the sum of all chunks");

// The sum over all threads, in thread 0. Neighbors are added first, then neighbors of these: the
// same tree as on the CPU.
__device__ inline double block_sum(double value) {
  __shared__ double warps[kThreads / kWarpSize];
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    sum = ((warps[0] + warps[1]) + (warps[2] + warps[3])) +
          ((warps[4] + warps[5]) + (warps[6] + warps[7]));
  }
  __syncthreads();  // the next sum may overwrite warps
  return sum;
}

template <class T, int kVector>
__device__ inline double block_sum(T (&lanes)[kVector]) {
#pragma unroll
  for (int width = kVector; width > 1; width /= 2) {
#pragma unroll
    for (int k = 0; k < width / 2; ++k) lanes[k] = lanes[2 * k] + lanes[2 * k + 1];
  }
  return block_sum(lanes[0]);
}

// The sum of all chunks' sums, in thread 0. They come from other blocks: past the L1 cache.
__device__ inline double total(const double* chunk_sums, int64_t num_chunks) {
  double lane = 0;
  for (int64_t i = threadIdx.x; i < num_chunks; i += kThreads) lane += __ldcg(chunk_sums + i);
  return block_sum(lane);
}

// True in the last block to arrive, which then sees what all others wrote.
__device__ inline bool is_last_block(unsigned* ticket) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (is_last) *ticket = 0;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

}  // namespace fusedopt::cuda
