#include "cpu/blocks.h"

#include <algorithm>
#include <type_traits>

#include "cpu/fetch.h"
#include "cpu/rows.h"
#include "math/blocks.h"

namespace fusedopt::cpu {

namespace {

constexpr int kBlocks = kRow<float> / kBlockSize;  // in a row
static_assert(kRow<float> % kBlockSize == 0, "a row begins with a block");

// The compiler makes other loops of blocks whose size is a constant.
using WholeBlock = std::integral_constant<int, kBlockSize>;

template <class code_t>
struct Decode {
  static FUSEDOPT_INLINE void run(const code_t* from, const float* units, int64_t count,
                                  float* to) {
    int first = 0;
    for (; first + kBlockSize <= count; first += kBlockSize) {
      block(from + first, *units++, WholeBlock(), to + first);
    }
    const int rest = static_cast<int>(count) - first;
    if (rest > 0) block(from + first, *units, rest, to + first);
  }

  template <class Size>
  static FUSEDOPT_INLINE void block(const code_t* from, float unit, Size size, float* to) {
#pragma GCC ivdep
    for (int i = 0; i < size; ++i) to[i] = decode(from[i], unit);
  }
};

// The scales of a row's blocks, as arrays.
struct RowScales {
  int32_t largest[kBlocks];
  float unit[kBlocks], per_unit[kBlocks];
  uint32_t mask[kBlocks];

  template <class Size>
  static FUSEDOPT_INLINE int32_t largest_of(const float* from, Size size) {
    int32_t result = 0;  // signed: SSE2 compares no unsigned integers
    for (int i = 0; i < size; ++i) {
      const int32_t magnitude = bit_cast<int32_t>(from[i]) & 0x7fffffff;
      result = magnitude > result ? magnitude : result;
    }
    return result;
  }

  FUSEDOPT_INLINE void measure(const float* from, int count, float codes) {
    const int whole = count / kBlockSize;
    for (int k = 0; k < kBlocks; ++k) {
      largest[k] = k < whole ? largest_of(from + k * kBlockSize, WholeBlock()) : 0;
    }
    const int rest = count - whole * kBlockSize;
    if (rest > 0) largest[whole] = largest_of(from + whole * kBlockSize, rest);
#pragma GCC ivdep
    for (int k = 0; k < kBlocks; ++k) {
      const BlockScale scale = block_scale(static_cast<uint32_t>(largest[k]), codes);
      unit[k] = scale.unit;
      per_unit[k] = scale.per_unit;
      mask[k] = scale.mask;
    }
  }
  FUSEDOPT_INLINE BlockScale of(int k) const { return {unit[k], per_unit[k], mask[k]}; }
};

// Calls encoder.block(first, size, scale) for each block of a row, and stores the scales.
template <class Encoder>
FUSEDOPT_INLINE void encode_row(const Encoder& encoder, const float* from, int64_t count,
                                float codes, float* units) {
  RowScales scales;
  const int size = static_cast<int>(count);
  scales.measure(from, size, codes);
  int k = 0;
  for (; (k + 1) * kBlockSize <= size; ++k) {
    fetch<kBlockSize>(encoder.to + k * kBlockSize + to_next_row(count));
    encoder.block(k * kBlockSize, WholeBlock(), scales.of(k));
    units[k] = scales.unit[k];
  }
  if (k * kBlockSize == size) return;
  encoder.block(k * kBlockSize, size - k * kBlockSize, scales.of(k));
  units[k] = scales.unit[k];
}

struct EncodeLinear {
  const float* const from;
  int8_t* const to;

  static FUSEDOPT_INLINE void run(const float* from, int64_t count, int8_t* to, float* units) {
    encode_row(EncodeLinear{from, to}, from, count, kLinearCodes, units);
  }

  template <class Size>
  FUSEDOPT_INLINE void block(int first, Size size, const BlockScale scale) const {
#pragma GCC ivdep
    for (int i = 0; i < size; ++i) {
      to[first + i] = static_cast<int8_t>(encode_linear(from[first + i], scale));
    }
  }
};

template <bool at_random>
struct EncodeRoot {
  const float* const from;
  uint8_t* const to;
  const RandomBits random;
  const int begin, shift;  // the element of the chunk that the row begins with

  static FUSEDOPT_INLINE void run(const float* from, int64_t first, int64_t count, uint8_t* to,
                                  float* units, const RandomBits random, int shift) {
    encode_row(EncodeRoot{from, to, random, static_cast<int>(first), shift}, from, count,
               kRootCodes, units);
  }

  template <class Size>
  FUSEDOPT_INLINE void block(int first, Size size, const BlockScale scale) const {
#pragma GCC ivdep
    for (int i = 0; i < size; ++i) {
      const uint32_t bits =
          at_random ? random.of(begin + first + i) >> shift & kRootRandom : kRootHalf;
      to[first + i] = static_cast<uint8_t>(encode_root(from[first + i], scale, bits));
    }
  }
};

template <class code_t>
code_t* codes(const Array& array, int64_t first) {
  return static_cast<code_t*>(array.data) + first;
}

float* units(const Array& array, int64_t first) {
  return static_cast<float*>(array.second) + first / kBlockSize;
}

}  // namespace

void load_blocks(Isa isa, const Array& array, int64_t first, int64_t count, float* to) {
  const float* const scales = units(array, first);
  if (is_root(array.storage)) {
    return run_best<Decode<uint8_t>>(isa, codes<uint8_t>(array, first), scales, count, to);
  }
  run_best<Decode<int8_t>>(isa, codes<int8_t>(array, first), scales, count, to);
}

void store_blocks(Isa isa, const float* from, int64_t first, int64_t count, const Array& array,
                  const RandomBits& random) {
  float* const scales = units(array, first);
  if (!is_root(array.storage)) {
    return run_best<EncodeLinear>(isa, from, count, codes<int8_t>(array, first), scales);
  }
  uint8_t* const to = codes<uint8_t>(array, first);
  if (is_stochastic(array.storage)) {
    return run_best<EncodeRoot<true>>(isa, from, first, count, to, scales, random,
                                      array.random_shift);
  }
  run_best<EncodeRoot<false>>(isa, from, first, count, to, scales, random, array.random_shift);
}

}  // namespace fusedopt::cpu
