// A float32 in two parts: a 16-bit number near it, and the rest of 16 or 8 bits. Stochastic
// rounding.
#pragma once

#include <cstdint>

#include "math/convert.h"

namespace fusedopt {

// All bits are 1 if a < b, else 0. Both are below 2^31. (Of `? :`, GCC would make branches here,
// and would not vectorize the loop.)
FUSEDOPT_INLINE constexpr uint32_t mask_of_less(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<int32_t>(a - b) >> 31);
}

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
    const uint32_t is_small = mask_of_less(magnitude, 0x38800000u);
    const uint32_t small = magnitude & is_small;
    // Adding 2^-17 aligns the mantissa to 2^-40, so that the addition does the rounding.
    const float aligning = bit_cast<float>(0x37000000u & mask_of_less(small, 0x37000000u));
    const float rounded = (bit_cast<float>(small) + aligning) - aligning;
    const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(rounded * 0x1p40f));
    uint32_t result = subnormal | (((magnitude - 0x38000000u) << 3) & ~is_small);
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

// The parts of a number, each in the low bits of a word. `rest` is a signed integer.
struct Parts {
  uint32_t number, rest;
};

// The extended format with 8 bits less, ties to even. The last 8 bits of the result are 0.
FUSEDOPT_INLINE uint32_t rounded_to_24_bits(uint32_t bits) {
  return (bits + 0x7fu + ((bits >> 8) & 1u)) & ~0xffu;
}

// rest_t: int16_t keeps all bits, int8_t those of a number rounded to 24 bits. The 16-bit number is
// the nearest one, ties away from zero: then the rest restores every number.
inline constexpr uint32_t kHalfUnit = 0x8000u;  // of the 16-bit number's last bit
template <class rest_t>
inline constexpr int kRestShift = 16 - 8 * static_cast<int>(sizeof(rest_t));

template <class scalar_t, class rest_t>
FUSEDOPT_INLINE Parts split(float value) {
  uint32_t bits = extended<scalar_t>::from(value);
  if constexpr (kRestShift<rest_t> != 0) bits = rounded_to_24_bits(bits);
  return {(bits + kHalfUnit) >> 16, (bits & 0xffffu) >> kRestShift<rest_t>};
}

// Stochastic rounding: away from zero with the probability of the bits that are dropped. `random`
// has 16 bits.
template <class scalar_t>
FUSEDOPT_INLINE uint32_t narrow_at_random(float value, uint32_t random) {
  return (extended<scalar_t>::from(value) + random) >> 16;
}

// Somebody may have changed the 16-bit number since the split. If it is 0 or inf now, the rest may
// not fit it; then the number counts alone.
template <class scalar_t, class rest_t>
FUSEDOPT_INLINE float join(uint32_t number, rest_t rest) {
  const uint32_t low = static_cast<uint32_t>(static_cast<int32_t>(rest)) << kRestShift<rest_t>;
  const float value = extended<scalar_t>::to((number << 16) + low);
  return value != value ? bits_of<scalar_t>::widen(number) : value;
}

}  // namespace fusedopt
