// States of 8 bits. Each block of kBlockSize neighboring elements has a scale, a float32. A code is
// an integer of 8 bits; an element is its code in units of the scale.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/convert.h"
#include "math/inline.h"

namespace fusedopt {

// How a state can be stored in 8 bits. kLinear: codes from -127 to 127, rounded to nearest even.
// kRoot: the roots of the elements, which are never negative, by codes from 0 to 255, rounded at
// random or to nearest. Only 0 has the code 0: an update divides by the root.
enum class Coding { kNone, kLinear, kRoot };

inline constexpr int kBlockSize = 64;
FUSEDOPT_INLINE constexpr int64_t blocks_of(int64_t elements) {
  return (elements + kBlockSize - 1) / kBlockSize;
}

inline constexpr float kLinearCodes = 127, kRootCodes = 255;  // the largest code
inline constexpr uint32_t kSmallestMagnitude = 0x0f800000u;   // 2^-96, as bits
inline constexpr uint32_t kNonfinite = 0x7f800000u;           // the magnitude of inf; nan is above

struct BlockScale {
  float unit;      // the stored scale; nan if an element of the block is not finite
  float per_unit;  // codes per 1
  uint32_t mask;   // of codes: a block with unit = nan has codes of 0
};

// From the largest magnitude in a block, as bits, and the largest code.
FUSEDOPT_INLINE BlockScale block_scale(uint32_t magnitude, float codes) {
  const bool is_finite = magnitude < kNonfinite;
  const bool counts = is_finite && magnitude > kSmallestMagnitude;
  const float largest = bit_cast<float>(counts ? magnitude : kSmallestMagnitude);
  const float unit = largest / codes;
  return {is_finite ? unit : bit_cast<float>(0x7fc00000u), codes / largest, is_finite ? 0xffu : 0u};
}

// Adding 1.5 * 2^23 rounds to an integer, in the low bits of the sum.
FUSEDOPT_INLINE uint32_t encode_linear(float value, const BlockScale& scale) {
  return bit_cast<uint32_t>(value * scale.per_unit + 0x1.8p23f) & scale.mask;
}

// Adding 256 rounds to a multiple of 2^-15, which `random` has 15 bits for.
inline constexpr uint32_t kRootRandom = 0x7fffu, kRootHalf = 0x4000u;
FUSEDOPT_INLINE uint32_t encode_root(float root, const BlockScale& scale, uint32_t random) {
  const uint32_t fixed = bit_cast<uint32_t>(root * scale.per_unit + 256.0f) - 0x43800000u;  // 256
  const uint32_t code = (fixed + random) >> 15;
  const uint32_t least = root > 0 ? 1 : 0;
  const uint32_t bounded = code < 255u ? code : 255u;
  return (bounded > least ? bounded : least) & scale.mask;
}

FUSEDOPT_INLINE float decode(int32_t code, float unit) { return static_cast<float>(code) * unit; }

}  // namespace fusedopt
