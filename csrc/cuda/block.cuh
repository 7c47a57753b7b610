// Operations that the threads of a block do together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/params.h"
#include "math/norm.h"

namespace fusedopt::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Combines neighboring lanes, then neighboring results, until one is left.
template <class Norm, int kCount>
__device__ double fold(double (&lanes)[kCount]) {
#pragma unroll
  for (int width = kCount; width > 1; width /= 2) {
#pragma unroll
    for (int k = 0; k < width / 2; ++k) lanes[k] = Norm::combine(lanes[2 * k], lanes[2 * k + 1]);
  }
  return lanes[0];
}

// The sum (or the maximum) over a warp's threads. It combines neighbors, then neighboring results,
// as the CPU does.
template <class Norm>
__device__ double warp_total(double value) {
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    value = Norm::combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// The sum (or the maximum) over a block's threads. Only thread 0 gets it.
template <class Norm>
__device__ double block_total(double value) {
  __shared__ double warps[kThreads / kWarpSize];
  value = warp_total<Norm>(value);
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  double result = 0;
  if (threadIdx.x == 0) {
    double lanes[kThreads / kWarpSize];
#pragma unroll
    for (int k = 0; k < kThreads / kWarpSize; ++k) lanes[k] = warps[k];
    result = fold<Norm>(lanes);
  }
  __syncthreads();  // the next call may overwrite `warps`
  return result;
}

// True in the last block that arrives. It sees everything that the other blocks have written.
__device__ inline bool is_last_block(unsigned* ticket) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;  // the last block resets it to 0
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

}  // namespace fusedopt::cuda
