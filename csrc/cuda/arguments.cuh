// A kernel's arguments: StepParams, followed by the StepArgs, the values that change at every step.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/layout.h"
#include "cuda/block.cuh"
#include "cuda/memory.cuh"

namespace fusedopt::cuda {

// Every GPU takes 4 KiB of arguments. From CUDA 12.1 on, compute capability 7.0 and later take
// 32,764 bytes.
inline constexpr int64_t kLargeArgs = 32424;

// Copies words from a kernel's arguments. All blocks call it.
__device__ inline void copy_words(const uint64_t* arguments, uint64_t* to, int64_t count) {
  const uint64_t* const from = like_other_memory(arguments);
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    to[i] = from[i];
  }
}

template <int64_t kBytes>
struct Arguments {
  StepParams step;
  bool reduces;     // norm pass only: the last block adds up the chunks
  bool is_inlined;  // the StepArgs are in `inlined`; else they are in step.step_args
  void* spill;      // null, or where to copy `inlined` for a later kernel
  alignas(8) unsigned char inlined[kBytes];

  __device__ void spill_args() const {
    if (spill == nullptr) return;
    copy_words(reinterpret_cast<const uint64_t*>(inlined), static_cast<uint64_t*>(spill),
               StepArgs(step).bytes() / static_cast<int64_t>(sizeof(uint64_t)));
  }

  // The step, with `grads` and `groups` at their addresses on the device.
  __device__ StepParams on_device() const {
    StepParams result = step;
    const StepArgs args(step);
    const auto* const bytes =
        is_inlined ? inlined : static_cast<const unsigned char*>(step.step_args);
    result.grads = reinterpret_cast<const void* const*>(bytes);
    result.groups = reinterpret_cast<const Group*>(bytes + args.groups_at());
    return result;
  }
};
static_assert(sizeof(Arguments<kInlinedArgs>) <= 4096 && sizeof(Arguments<kLargeArgs>) <= 32764,
              "CUDA's limits on the size of a kernel's arguments");
static_assert(sizeof(Group) % sizeof(uint64_t) == 0, "arguments are copied in words of 8 bytes");

}  // namespace fusedopt::cuda
