// A kernel's arguments: the pass, and behind it by value what moves from step to step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda/block.cuh"
#include "cuda/memory.cuh"
#include "cuda/passes.h"

namespace fusedopt::cuda {

// CUDA takes 4 KiB of arguments anywhere, and 32,764 bytes since 12.1 on compute capability 7.0.
// The smaller size serves up to about 450 tensors.
inline constexpr size_t kSmall = 3808;
inline constexpr size_t kLarge = 32480;

// From a kernel's arguments, by all blocks.
__device__ inline void copy_words(const uint64_t* arguments, uint64_t* to, size_t count) {
  const uint64_t* const from = like_other_memory(arguments);
  for (size_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    to[i] = from[i];
  }
}

template <size_t kBytes>
struct Arguments {
  StepParams step;
  unsigned* ticket;
  const void* step_args;                     // null: it is inlined
  unsigned char* keep;                       // null, or where to leave what is inlined
  alignas(8) unsigned char inlined[kBytes];  // the gradients' pointers, then the groups

  __device__ void leave() const {
    if (keep == nullptr) return;
    const size_t size = step.num_tensors * sizeof(void*) + step.num_groups * sizeof(Group);
    copy_words(reinterpret_cast<const uint64_t*>(inlined), reinterpret_cast<uint64_t*>(keep),
               size / sizeof(uint64_t));
  }

  // The pass as the device sees it.
  __device__ StepParams on_device() const {
    StepParams result = step;
    result.grads = static_cast<const void* const*>(step_args != nullptr ? step_args : inlined);
    result.groups = reinterpret_cast<const Group*>(result.grads + result.num_tensors);
    return result;
  }
};
static_assert(sizeof(Arguments<kSmall>) <= 4096 && sizeof(Arguments<kLarge>) <= 32764,
              "CUDA's limits on the size of a kernel's arguments");

static_assert(sizeof(Group) % sizeof(uint64_t) == 0, "what moves is copied in words of 8 bytes");

inline size_t grads_bytes(const StepParams& step) { return step.num_tensors * sizeof(void*); }
inline size_t total_bytes(const StepParams& step) {
  return grads_bytes(step) + step.num_groups * sizeof(Group);
}

// Bytes [offset, offset + size) of the gradients' pointers and the groups behind them.
inline void copy_step_args(const StepParams& step, size_t offset, size_t size, unsigned char* to) {
  const auto* grads = reinterpret_cast<const unsigned char*>(step.grads);
  const auto* groups = reinterpret_cast<const unsigned char*>(step.groups);
  const size_t split = grads_bytes(step);
  const size_t of_grads = offset < split ? std::min(size, split - offset) : 0;
  if (of_grads > 0) memcpy(to, grads + offset, of_grads);
  if (of_grads < size) memcpy(to + of_grads, groups + (offset + of_grads - split), size - of_grads);
}

}  // namespace fusedopt::cuda
