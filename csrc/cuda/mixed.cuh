// Arrays whose format is selected at run time, for tensors that mix several formats.
#pragma once

#include <cstdint>
#include <limits>

#include "cuda/blocks.cuh"
#include "cuda/vector.cuh"
#include "math/random.h"
#include "math/split.h"

namespace fusedopt::cuda {

// The storages of all of a tensor's arrays in one register: kStorageBits each.
enum : uint32_t {
  kIsWide = 1,
  kIsFloat16 = 2,
  kIsStochastic = 4,
  kIsMaster = 8,
  kIs24Bits = 16,
  kIsInBlocks = 32
};
inline constexpr int kStorageBits = 6;

__device__ inline uint32_t packed(Storage storage) {
  return (storage == Storage::kFloat32 ? kIsWide : 0) | (is_float16(storage) ? kIsFloat16 : 0) |
         (is_stochastic(storage) ? kIsStochastic : 0) | (rest_bytes(storage) > 0 ? kIsMaster : 0) |
         (is_24_bits(storage) ? kIs24Bits : 0) | (is_in_blocks(storage) ? kIsInBlocks : 0);
}

// The parameter's storage, the gradient's, and those of the states.
__device__ inline uint32_t packed(const TensorShape& shape) {
  uint32_t result = packed(shape.param) | packed(shape.grad) << kStorageBits;
#pragma unroll
  for (int k = 0; k < kMaxStates; ++k)
    result |= packed(shape.states[k]) << (kStorageBits * (2 + k));
  return result;
}

// The addresses of a chunk's arrays, in shared memory: in the order of packed(), then those of
// their second arrays.
inline constexpr int kMixedArrays = 2 + kMaxStates;
struct MixedPointers {
  char* volatile at[2 * kMixedArrays];
};

// The elements first, first + kStride, ... of a chunk, one by one. bits_t has an element's bits; a
// word of a vector holds one, two or four.
template <int kCount, int kStride>
struct Singles {
  const int first, size;

  template <class bits_t>
  static constexpr int kPerWord = sizeof(uint32_t) / sizeof(bits_t);
  template <class bits_t>
  static constexpr int shift(int k) {
    return k % kPerWord<bits_t> * 8 * sizeof(bits_t);
  }

  template <class bits_t>
  __device__ void load(const char* from, int begin, Vector<float, kCount>& words) const {
    uint32_t bits[kCount / kPerWord<bits_t>] = {};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int i = first + k * kStride;
      if (i >= size) continue;
      const uint32_t it = load_global(reinterpret_cast<const bits_t*>(from) + i);
      bits[k / kPerWord<bits_t>] |= it << shift<bits_t>(k);
    }
#pragma unroll
    for (int k = 0; k < kCount / kPerWord<bits_t>; ++k) {
      words.at[begin + k] = bit_cast<float>(bits[k]);
    }
  }
  template <class bits_t>
  __device__ void store(const Vector<float, kCount>& words, int begin, char* to) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int i = first + k * kStride;
      if (i >= size) continue;
      const auto word = bit_cast<uint32_t>(words.at[begin + k / kPerWord<bits_t>]);
      store_global(reinterpret_cast<bits_t*>(to) + i,
                   static_cast<bits_t>(word >> shift<bits_t>(k)));
    }
  }
};

// As Slice. A vector holds the bits of its elements as they are stored, between load() and widen()
// and again after narrow(): 32-bit elements, or 16-bit elements in its first half, and their rests
// of 16 or 8 bits from its middle on, or 8-bit elements: see blocks.cuh.
enum class Part { kParam, kGrad, kState };
template <Part part>
struct MixedSlice {
  char* volatile* const pointers;  // in shared memory: no registers keep them between accesses
  const uint32_t storages;
  const int index;  // among these

  // All threads of a block call it. Thread 0 writes the pointers.
  __device__ MixedSlice(const Array& array, int64_t begin, const TensorShape& shape, int index,
                        MixedPointers& shared)
      : pointers(shared.at), storages(packed(shape)), index(index) {
    if (threadIdx.x != 0) return;
    pointers[index] = static_cast<char*>(array.data) + begin * bytes_of(array.storage);
    if (part == Part::kParam) set_second(array, begin * rest_bytes(array.storage));
    if (part == Part::kState) set_second(array, begin / kBlockSize * kWord);
  }

  template <int kVector>
  __device__ bool aligned() const {
    const int bytes = kVector * (is_wide() ? kWord : is_in_blocks() ? kByte : kHalf);
    const auto fits = [](const char* address, int bytes) {
      return reinterpret_cast<uintptr_t>(address) % (bytes < kVectorBytes ? bytes : kVectorBytes) ==
             0;
    };
    return fits(data(), bytes) &&
           (!is_master() || fits(second(), is_24_bits() ? kVector : kVector * kHalf));
  }

  template <int kVector>
  __device__ Vector<float, kVector> load(int first) const {
    if (is_wide()) {
      return load_global(reinterpret_cast<const Vector<float, kVector>*>(data() + first * kWord));
    }
    Vector<float, kVector> words{};
    if (is_in_blocks()) {
      load_words<kVector / 4>(data() + first, 0, words);
      load_units<kVector, 1>(second(), first, kNoEnd, words);
      return words;
    }
    load_words<kVector / 2>(data() + first * kHalf, 0, words);
    if (!is_master()) return words;
    if (is_24_bits()) {
      load_words<kVector / 4>(second() + first, kVector / 2, words);
    } else {
      load_words<kVector / 2>(second() + first * kHalf, kVector / 2, words);
    }
    return words;
  }
  template <int kVector>
  __device__ void store(int first, const Vector<float, kVector>& words) const {
    if (is_wide()) {
      return store_global(reinterpret_cast<Vector<float, kVector>*>(data() + first * kWord), words);
    }
    if (is_in_blocks()) {
      store_words<kVector / 4>(words, 0, data() + first);
      return store_units<kVector, 1>(second(), first, kNoEnd, words);
    }
    store_words<kVector / 2>(words, 0, data() + first * kHalf);
    if (!is_master()) return;
    if (is_24_bits()) {
      store_words<kVector / 4>(words, kVector / 2, second() + first);
    } else {
      store_words<kVector / 2>(words, kVector / 2, second() + first * kHalf);
    }
  }

  template <int kVector>
  __device__ Vector<float, kVector> load_some(int first, int size) const {
    if (first + kVector <= size && aligned<kVector>()) return load<kVector>(first);
    return load_each<kVector, 1>(first, size);
  }

  template <int kCount, int kStride>
  __device__ Vector<float, kCount> load_each(int first, int size) const {
    Vector<float, kCount> words{};
    const Singles<kCount, kStride> singles{first, size};
    if (is_wide()) {
      singles.template load<uint32_t>(data(), 0, words);
    } else if (is_in_blocks()) {
      singles.template load<uint8_t>(data(), 0, words);
      load_units<kCount, kStride>(second(), first, size, words);
    } else {
      singles.template load<uint16_t>(data(), 0, words);
      if (!is_master()) return words;
      if (is_24_bits()) {
        singles.template load<uint8_t>(second(), kCount / 2, words);
      } else {
        singles.template load<uint16_t>(second(), kCount / 2, words);
      }
    }
    return words;
  }
  template <int kCount, int kStride>
  __device__ void store_each(int first, int size, const Vector<float, kCount>& words) const {
    const Singles<kCount, kStride> singles{first, size};
    if (is_wide()) {
      singles.template store<uint32_t>(words, 0, data());
    } else if (is_in_blocks()) {
      singles.template store<uint8_t>(words, 0, data());
      store_units<kCount, kStride>(second(), first, size, words);
    } else {
      singles.template store<uint16_t>(words, 0, data());
      if (!is_master()) return;
      if (is_24_bits()) {
        singles.template store<uint8_t>(words, kCount / 2, second());
      } else {
        singles.template store<uint16_t>(words, kCount / 2, second());
      }
    }
  }

  // From stored bits to float32. A state with a coding may have 8 bits.
  template <Coding coding = Coding::kNone, int kCount>
  __device__ __forceinline__ void widen(Vector<float, kCount>& words) const {
    if (is_wide()) return;
    if constexpr (coding != Coding::kNone) {
      if (is_in_blocks()) return decode<coding>(words);
    }
    visit_half([&](auto format) {
      using half_t = decltype(format);
      // From the last element on: a word is converted after those elements that it holds.
      if (!is_master()) {
#pragma unroll
        for (int k = kCount - 1; k >= 0; --k) {
          words.at[k] = fusedopt::widen(half_t{half_of(words.at[k / 2], k)});
        }
        return;
      }
      float values[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const uint32_t low = is_24_bits() ? byte_of(words.at[kCount / 2 + k / 4], k) << 8
                                          : half_of(words.at[kCount / 2 + k / 2], k);
        values[k] = join<half_t>(half_of(words.at[k / 2], k), static_cast<int16_t>(low));
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) words.at[k] = values[k];
    });
  }
  template <int kCount>
  __device__ __forceinline__ Vector<float, kCount> widened(Vector<float, kCount> words) const {
    widen(words);
    return words;
  }

  // From float32 to stored bits, of the elements first, first + kStride, ... of a chunk.
  template <int kStride, Coding coding = Coding::kNone, int kCount>
  __device__ __forceinline__ void narrow(int first, int size, const RandomBits& random,
                                         Vector<float, kCount>& values) const {
    if (is_wide()) return;
    if constexpr (coding != Coding::kNone) {
      if (is_in_blocks()) {
        return encode<coding, kStride>(first, size, is(kIsStochastic), random, values);
      }
    }
    visit_half([&](auto format) {
      using half_t = decltype(format);
      if (is(kIsStochastic | kIsMaster)) {
        // Both cut bits off, after adding random bits or half a unit.
        uint32_t rests[kCount / 2] = {};
#pragma unroll
        for (int k = 0; k < kCount; k += 2) {
          uint32_t numbers = 0;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t bits = extended<half_t>::from(values.at[k + i]);
            if (is_24_bits()) bits = rounded_to_24_bits(bits);
            const uint32_t added =
                is_master() ? kHalfUnit
                            : random.of(first + (k + i) * kStride) >> kRandomShift & 0xffffu;
            numbers |= (bits + added) >> 16 << 16 * i;
            if (is_24_bits()) {
              rests[k / 4] |= (bits >> 8 & 0xffu) << (k + i) % 4 * 8;
            } else {
              rests[k / 2] |= (bits & 0xffffu) << 16 * i;
            }
          }
          values.at[k / 2] = bit_cast<float>(numbers);
        }
        if (is_master()) {
#pragma unroll
          for (int k = 0; k < kCount / 2; ++k) {
            values.at[kCount / 2 + k] = bit_cast<float>(rests[k]);
          }
        }
        return;
      }
#pragma unroll
      for (int k = 0; k < kCount; k += 2) {
        values.at[k / 2] = bit_cast<float>(narrow_pair<half_t>(values.at[k], values.at[k + 1]));
      }
    });
  }

  __device__ bool is_in_blocks() const {
    if constexpr (part != Part::kState) return false;
    return is(kIsInBlocks);
  }

 private:
  static constexpr int kWord = 4, kHalf = 2, kByte = 1;  // bytes
  static constexpr int kNoEnd = std::numeric_limits<int>::max();
  static constexpr int kRandomShift = part == Part::kState ? kStateShift : kParamShift;

  __device__ char* data() const { return pointers[index]; }
  __device__ char* second() const { return pointers[kMixedArrays + index]; }
  __device__ void set_second(const Array& array, int64_t begin) const {
    pointers[kMixedArrays + index] = static_cast<char*>(array.second) + begin;
  }

  __device__ bool is(uint32_t bit) const { return (storages & bit << kStorageBits * index) != 0; }
  __device__ bool is_wide() const { return is(kIsWide); }
  __device__ bool is_master() const {
    if constexpr (part != Part::kParam) return false;
    return is(kIsMaster);
  }
  __device__ bool is_24_bits() const {
    if constexpr (part != Part::kParam) return false;
    return is(kIs24Bits);
  }

  template <class Body>
  __device__ __forceinline__ void visit_half(Body&& body) const {
    if (is(kIsFloat16)) {
      body(float16{});
    } else {
      body(bfloat16{});
    }
  }

  __device__ static uint16_t half_of(float word, int k) {
    return static_cast<uint16_t>(bit_cast<uint32_t>(word) >> k % 2 * 16);
  }
  __device__ static uint32_t byte_of(float word, int k) {
    return bit_cast<uint32_t>(word) >> k % 4 * 8 & 0xffu;
  }
  template <int kCount, int kVector>
  __device__ static void load_words(const char* from, int begin, Vector<float, kVector>& words) {
    const auto some = load_global(reinterpret_cast<const Vector<float, kCount>*>(from));
#pragma unroll
    for (int k = 0; k < kCount; ++k) words.at[begin + k] = some.at[k];
  }
  template <int kCount, int kVector>
  __device__ static void store_words(const Vector<float, kVector>& words, int begin, char* to) {
    Vector<float, kCount> some;
#pragma unroll
    for (int k = 0; k < kCount; ++k) some.at[k] = words.at[begin + k];
    store_global(reinterpret_cast<Vector<float, kCount>*>(to), some);
  }
};

}  // namespace fusedopt::cuda
