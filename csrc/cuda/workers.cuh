// The workers that end a step on CUDA: the threads of one block. See core/finish.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/params.h"
#include "cuda/block.cuh"
#include "cuda/exact_sum.cuh"

namespace fusedopt::cuda {

// The sum over a tensor of one chunk. One thread calls it.
struct OneChunk {
  int64_t chunk;

  template <class Norm, class Value>
  __device__ double of(Value value) const {
    return value(chunk);
  }
  template <class Value>
  __device__ double exact(Value value) const {
    return value(chunk);
  }
};

// The sum over a tensor's chunks. All threads of a warp call it, and all get it.
struct WarpSum {
  int64_t first, count;

  template <class Norm, class Value>
  __device__ double of(Value value) const {
    double lane = 0;
    for (int64_t i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
      lane = Norm::combine(lane, value(first + i));
    }
    return warp_total<Norm>(lane);
  }
  template <class Value>
  __device__ double exact(Value value) const {
    const double total = warp_exact_total(count, [&](int64_t i) { return value(first + i); });
    return __shfl_sync(kAllLanes, total, 0);
  }
};
static_assert(kWarpSize == kTensorLanes, "a warp folds the lanes of a tensor");

// The smaller of two coefficients.
struct Smallest {
  __device__ static double combine(double a, double b) { return smaller(a, b); }
};

struct Ranked {
  double lower, upper;
};

// `shared` points to two doubles in shared memory.
struct BlockWorkers {
  double* shared;

  template <class Body>
  __device__ void once(Body body) const {
    __syncthreads();
    if (threadIdx.x == 0) body();
    __syncthreads();
  }

  template <class Body>
  __device__ void each(int64_t count, Body body) const {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) body(i);
  }

  // A thread gathers a tensor of one chunk, and all threads of a warp gather a tensor of several
  // chunks, or of no chunk. Then each thread has a tensor of its own.
  template <class Gather, class Body>
  __device__ void each_tensor(const StepParams& step, Gather gather, Body body) const {
    const int lane = threadIdx.x % kWarpSize;
    for (int64_t first = threadIdx.x - lane; first < step.num_tensors; first += kThreads) {
      const int64_t mine = first + lane;
      const bool is_there = mine < step.num_tensors;
      const bool is_alone = is_there && chunks_of(step.shapes[mine].numel) == 1;
      decltype(gather(mine, OneChunk{})) gathered{};
      if (is_alone) gathered = gather(mine, OneChunk{step.shapes[mine].first_chunk});
      unsigned others = __ballot_sync(kAllLanes, is_there && !is_alone);
      for (; others != 0; others &= others - 1) {
        const int turn = __ffs(others) - 1;
        const TensorShape& shape = step.shapes[first + turn];
        const auto its = gather(first + turn, WarpSum{shape.first_chunk, chunks_of(shape.numel)});
        if (lane == turn) gathered = its;
      }
      if (is_there) body(mine, gathered);
    }
  }

  __device__ double total(const StepParams& step) const {
    return broadcast(exact_total_of_chunks(step));
  }

  template <class Value>
  __device__ double smallest(int64_t count, double start, Value value) const {
    double mine = start;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) mine = smaller(value(i), mine);
    return broadcast(block_total<Smallest>(mine));
  }

  // A norm's rank is the number of norms that sort before it. Equal norms keep their order.
  __device__ Ranked ranked(const double* norms, int64_t size, int64_t rank) const {
    const int64_t next = std::min(rank + 1, size - 1);
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      int64_t before = 0;
      for (int64_t k = 0; k < size; ++k) {
        before += norms[k] < norms[i] || (norms[k] == norms[i] && k < i) ? 1 : 0;
      }
      if (before == rank) shared[0] = norms[i];
      if (before == next) shared[1] = norms[i];
    }
    __syncthreads();
    return {shared[0], shared[1]};
  }

  // Other blocks have written the value: the load goes past the L1 cache.
  template <class T>
  __device__ static T load(const T* value) {
    return __ldcg(value);
  }

  // The block that updates the only chunk of a tensor also advances its counters: no other block
  // reads them.
  __device__ static bool has_advanced(const TensorShape& shape) {
    return chunks_of(shape.numel) == 1;
  }

 private:
  __device__ double broadcast(double value) const {
    if (threadIdx.x == 0) shared[0] = value;
    __syncthreads();
    const double result = shared[0];
    __syncthreads();
    return result;
  }
};

}  // namespace fusedopt::cuda
