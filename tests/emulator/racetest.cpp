// Tests that ThreadSanitizer sees the races that races.h speaks of, and none where there is none:
// runs the kernel that is named, and prints the names without one.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace {

constexpr unsigned kThreads = 256, kBlocks = 3;  // As many threads as the kernels that ship.

struct Memory {
  int of_thread[kBlocks * kThreads];
  int of_block[kBlocks];
  unsigned ticket;
  int sum;
};

__device__ unsigned rank() { return blockIdx.x * kThreads + threadIdx.x; }

// ------------------------------------------------------------------------------ Within one block

// Each thread reads what its neighbor has written.
template <bool barrier_before, bool barrier_after>
__device__ void neighbors(Memory* memory) {
  __shared__ int values[kThreads];
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = round;
    if (barrier_before) __syncthreads();
    memory->of_thread[rank()] = values[(threadIdx.x + 1) % kThreads];
    if (barrier_after) __syncthreads();
  }
}

// The same within a warp.
template <bool barrier>
__device__ void lanes(Memory* memory) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = 1;
  if (barrier) __syncwarp();
  __shfl_xor_sync(0xffffffff, 1, 1);
  memory->of_thread[rank()] = values[threadIdx.x ^ 1];
}

// Warps read what another one has written, with a barrier of their own only.
__device__ void warps(Memory* memory) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = 1;
  __syncwarp();
  memory->of_thread[rank()] = values[(threadIdx.x + 32) % kThreads];
}

// -------------------------------------------------------------------------------- Between blocks

// The last block to arrive adds up what the others left.
template <bool fence_before, bool fence_after>
__device__ void last_block(Memory* memory) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) memory->of_block[blockIdx.x] = 1;
  if (fence_before) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicInc(&memory->ticket, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  if (fence_after) __threadfence();
  if (threadIdx.x != 0) return;
  memory->sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) memory->sum += memory->of_block[i];
}

__device__ void same_value(Memory* memory) {
  if (threadIdx.x == 0) memory->sum = 1;
}

__device__ void atomics(Memory* memory) { atomicAdd(&memory->sum, 1); }

// ------------------------------------------------------------------------------------------------

template <void (*body)(Memory*)>
__global__ void kernel(Memory* memory) {
  body(memory);
}

const struct {
  const char* name;
  void (*kernel)(Memory*);
} kCases[] = {
    {"ok: neighbors", kernel<neighbors<true, true>>},
    {"race: neighbors without a barrier", kernel<neighbors<false, true>>},
    {"race: neighbors without a barrier before the next round", kernel<neighbors<true, false>>},
    {"ok: lanes", kernel<lanes<true>>},
    {"race: lanes with a shuffle only", kernel<lanes<false>>},
    {"race: warps", kernel<warps>},
    {"ok: last block", kernel<last_block<true, true>>},
    {"race between blocks: no fence before the ticket", kernel<last_block<false, true>>},
    {"race between blocks: no fence after the ticket", kernel<last_block<true, false>>},
    {"race between blocks: the same value", kernel<same_value>},
    {"ok: atomics", kernel<atomics>},
};

}  // namespace

int main(int argc, char** argv) {
  for (const auto& it : kCases) {
    if (argc == 1) std::puts(it.name);
    if (argc == 1 || std::strcmp(argv[1], it.name) != 0) continue;
    // Twice, as a later launch comes after an earlier one, in blocks in another order.
    Memory memory{};
    cudaLaunchConfig_t config{};
    config.gridDim = kBlocks;
    config.blockDim = kThreads;
    for (unsigned seed : {1u, 2u}) {
      emulator::set_block_order(seed);
      if (cudaLaunchKernelEx(&config, it.kernel, &memory) != cudaSuccess) return 1;
    }
  }
  return 0;
}
