// A float32 in two parts of 16 bits: a 16-bit number near it, and the rest. Stochastic rounding.
#pragma once

#include <cstdint>

#include "math/convert.h"

namespace fusedopt {

// extended<scalar_t>: the 16-bit format with 16 more bits of mantissa, as an integer.
template <class scalar_t>
struct extended;

// bfloat16 with 16 more bits is float32.
template <>
struct extended<bfloat16> {
  static FUSEDOPT_INLINE uint32_t from(float value) {
    return value != value ? 0x7fc00000u : bit_cast<uint32_t>(value);
  }
  static FUSEDOPT_INLINE float to(uint32_t bits) { return bit_cast<float>(bits); }
};

// float16 with 16 more bits has 5 bits of exponent and 26 of mantissa. It holds every float32 from
// 2^-17 to 65536. A smaller one is rounded to a multiple of 2^-40, ties to even; a larger one
// becomes inf.
template <>
struct extended<float16> {
  static FUSEDOPT_INLINE uint32_t from(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const float small = magnitude < 0x38800000u ? bit_cast<float>(magnitude) : 0.0f;
    // Adding 2^-17 aligns the mantissa to 2^-40, so that the addition does the rounding.
    const float rounded = small < 0x1p-17f ? (small + 0x1p-17f) - 0x1p-17f : small;
    const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(rounded * 0x1p40f));
    uint32_t result = magnitude < 0x38800000u ? subnormal : (magnitude - 0x38000000u) << 3;
    result = magnitude >= 0x47800000u ? 0x7c000000u : result;
    result = magnitude > 0x7f800000u ? 0x7e000000u : result;
    return result | (bits & 0x80000000u);
  }
  static FUSEDOPT_INLINE float to(uint32_t bits) {
    const uint32_t magnitude = bits & 0x7fffffffu;
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-40f;
    uint32_t result =
        magnitude < 0x04000000u ? bit_cast<uint32_t>(subnormal) : (magnitude >> 3) + 0x38000000u;
    result = magnitude >= 0x7c000000u ? 0x7f800000u : result;
    result = magnitude > 0x7c000000u ? 0x7fc00000u : result;
    return bit_cast<float>(result | (bits & 0x80000000u));
  }
};

// The parts of a number, each in the low half of a word. `rest` is a signed 16-bit integer.
struct Parts {
  uint32_t number, rest;
};

// The 16-bit number is the nearest one, ties away from zero: then the rest restores every number.
inline constexpr uint32_t kHalfUnit = 0x8000u;  // of the 16-bit number's last bit
template <class scalar_t>
FUSEDOPT_INLINE Parts split(float value) {
  const uint32_t bits = extended<scalar_t>::from(value);
  return {(bits + kHalfUnit) >> 16, bits & 0xffffu};
}

// Stochastic rounding: away from zero with the probability of the bits that are dropped. `random`
// has 16 bits.
template <class scalar_t>
FUSEDOPT_INLINE uint32_t narrow_at_random(float value, uint32_t random) {
  return (extended<scalar_t>::from(value) + random) >> 16;
}

// Somebody may have changed the 16-bit number since the split. If it is 0 or inf now, the rest may
// not fit it; then the number counts alone.
template <class scalar_t>
FUSEDOPT_INLINE float join(uint32_t number, int32_t rest) {
  const float value = extended<scalar_t>::to((number << 16) + static_cast<uint32_t>(rest));
  return value != value ? bits_of<scalar_t>::widen(number) : value;
}

}  // namespace fusedopt
