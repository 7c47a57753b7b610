// Arrays of 8 bits. The threads of a warp that have a block's elements form a team: each has
// kPerThread of them, and the first thread loads and stores the scale.
#pragma once

#include <cstdint>
#include <limits>

#include "cuda/block.cuh"
#include "cuda/vector.cuh"
#include "math/blocks.h"
#include "math/random.h"

namespace fusedopt::cuda {

// Of threads that have kCount elements each, at a distance of kStride: neighbors, or every 32nd.
// All threads of a warp call these functions together.
template <int kCount, int kStride>
struct Team {
  static_assert(kStride == 1 || kStride == kWarpSize, "a warp's elements are whole blocks");
  static constexpr int kPerThread = kStride == 1 ? kCount : kBlockSize / kWarpSize;
  static constexpr int kThreadsPerBlock = kBlockSize / kPerThread;
  static constexpr int kBlocks = kCount / kPerThread;  // that a thread has elements of

  __device__ static int rank() { return threadIdx.x % kThreadsPerBlock; }

  // The scale of a thread's block with this index. `first` is the thread's first element.
  __device__ static float load_unit(const char* units, int first, int size, int block) {
    const int element = first + block * kBlockSize;
    float unit = 0;
    if (rank() == 0 && element < size) {
      unit = load_global(reinterpret_cast<const float*>(units) + element / kBlockSize);
    }
    return __shfl_sync(kAllLanes, unit, static_cast<int>(threadIdx.x % kWarpSize) - rank());
  }
  __device__ static void store_unit(char* units, int first, int size, int block, float unit) {
    const int element = first + block * kBlockSize;
    if (rank() != 0 || element >= size) return;
    store_global(reinterpret_cast<float*>(units) + element / kBlockSize, unit);
  }

  // The largest magnitude in a block, as bits.
  __device__ static uint32_t largest(const Vector<float, kCount>& values, int first, int size,
                                     int block) {
    uint32_t result = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int k = block * kPerThread + i;
      const uint32_t magnitude = bit_cast<uint32_t>(values.at[k]) & 0x7fffffffu;
      const bool counts = kStride == 1 || first + k * kStride < size;
      result = counts && magnitude > result ? magnitude : result;
    }
#pragma unroll
    for (int distance = 1; distance < kThreadsPerBlock; distance *= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, result, distance);
      result = other > result ? other : result;
    }
    return result;
  }
};

// A vector of 8-bit elements as it is stored: the codes, four to a word, and then the scales of its
// first and of its second half.
template <int kCount>
inline constexpr int kUnitsAt = kCount / 4;

template <int kCount, int kStride>
__device__ void load_units(const char* units, int first, int size, Vector<float, kCount>& words) {
  using Threads = Team<kCount, kStride>;
#pragma unroll
  for (int block = 0; block < Threads::kBlocks; ++block) {
    words.at[kUnitsAt<kCount> + block] = Threads::load_unit(units, first, size, block);
  }
  if (Threads::kBlocks == 1) words.at[kUnitsAt<kCount> + 1] = words.at[kUnitsAt<kCount>];
}

template <int kCount, int kStride>
__device__ void store_units(char* units, int first, int size, const Vector<float, kCount>& words) {
  using Threads = Team<kCount, kStride>;
#pragma unroll
  for (int block = 0; block < Threads::kBlocks; ++block) {
    Threads::store_unit(units, first, size, block, words.at[kUnitsAt<kCount> + block]);
  }
}

// From codes to float32: elements, or their roots. 2^23 + code is a float32 with the code in its
// last bits, so that no instruction converts.
template <Coding coding, int kCount>
__device__ __forceinline__ void decode(Vector<float, kCount>& words) {
  constexpr uint32_t kFlipped = coding == Coding::kLinear ? 0x80u : 0u;
  constexpr float kZero = 0x1p23f + static_cast<float>(kFlipped);
  const float units[2] = {words.at[kUnitsAt<kCount>], words.at[kUnitsAt<kCount> + 1]};
  // From the last element on: a word is overwritten after those elements that it holds.
#pragma unroll
  for (int k = kCount - 1; k >= 0; --k) {
    const uint32_t word = bit_cast<uint32_t>(words.at[k / 4]);
    const uint32_t code = (word >> k % 4 * 8 & 0xffu) ^ kFlipped;
    words.at[k] = (bit_cast<float>(0x4b000000u | code) - kZero) * units[k * 2 / kCount];
  }
}

// From float32 to codes, of the elements first, first + kStride, ... of a chunk of `size` elements.
template <Coding coding, int kStride, int kCount>
__device__ __forceinline__ void encode(int first, int size, bool at_random,
                                       const RandomBits& random, Vector<float, kCount>& values) {
  using Threads = Team<kCount, kStride>;
  uint32_t codes[kUnitsAt<kCount>] = {};
  float units[Threads::kBlocks];
#pragma unroll
  for (int block = 0; block < Threads::kBlocks; ++block) {
    const BlockScale scale = block_scale(Threads::largest(values, first, size, block),
                                         coding == Coding::kLinear ? kLinearCodes : kRootCodes);
    units[block] = scale.unit;
#pragma unroll
    for (int i = 0; i < Threads::kPerThread; ++i) {
      const int k = block * Threads::kPerThread + i;
      uint32_t code;
      if constexpr (coding == Coding::kLinear) {
        code = encode_linear(values.at[k], scale);
      } else {
        const uint32_t bits = at_random ? random.of(first + k * kStride) & kRootRandom : kRootHalf;
        code = encode_root(values.at[k], scale, bits);
      }
      codes[k / 4] |= code << k % 4 * 8;
    }
  }
#pragma unroll
  for (int k = 0; k < kUnitsAt<kCount>; ++k) values.at[k] = bit_cast<float>(codes[k]);
#pragma unroll
  for (int k = 0; k < Threads::kBlocks; ++k) values.at[kUnitsAt<kCount> + k] = units[k];
}

}  // namespace fusedopt::cuda
