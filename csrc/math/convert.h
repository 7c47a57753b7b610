// Storage types, the type that each is computed in, and the conversions between them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "math/inline.h"

namespace fusedopt {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// opmath_t: 16-bit values are computed in float32, every other type in itself.
template <class scalar_t>
struct opmath {
  using type = scalar_t;
};
template <>
struct opmath<bfloat16> {
  using type = float;
};
template <>
struct opmath<float16> {
  using type = float;
};
template <class scalar_t>
using opmath_t = typename opmath<scalar_t>::type;

template <class To, class From>
FUSEDOPT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Conversions in plain C++, where no instruction converts. `bits` is the low half of a word.
template <class scalar_t>
struct bits_of;

template <>
struct bits_of<bfloat16> {
  static FUSEDOPT_INLINE float widen(uint32_t bits) { return bit_cast<float>(bits << 16); }
  static FUSEDOPT_INLINE uint32_t narrow(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return value != value ? 0x7fc0u : rounded;
  }
};

template <>
struct bits_of<float16> {
  // Move exponent and mantissa into place, then correct the exponent's bias by one multiplication.
  // The multiplication is exact, and it normalizes subnormal numbers too.
  static FUSEDOPT_INLINE float widen(uint32_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16;
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    const float rebiased = bit_cast<float>(magnitude) * 0x1p112f;
    const uint32_t nonfinite = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return bit_cast<float>(bit_cast<uint32_t>(rebiased) | nonfinite | sign);
  }
  static FUSEDOPT_INLINE uint32_t narrow(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal numbers: correct the exponent's bias, then round by the 13 bits that are dropped.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal numbers: adding 0.5 aligns the mantissa, so that the addition does the rounding.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x47800000u ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return result | sign;
  }
};

// widen() is exact for every type.
FUSEDOPT_INLINE float widen(float value) { return value; }
FUSEDOPT_INLINE double widen(double value) { return value; }
FUSEDOPT_INLINE float widen(bfloat16 value) { return bits_of<bfloat16>::widen(value.bits); }
FUSEDOPT_INLINE float widen(float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return bits_of<float16>::widen(value.bits);
#endif
}

// narrow() rounds to nearest, ties to even. A NaN stays a NaN; its payload is not specified.
template <class scalar_t>
FUSEDOPT_INLINE scalar_t narrow(opmath_t<scalar_t> value) {
  if constexpr (sizeof(scalar_t) == sizeof(value)) {
    return value;
  } else {
    scalar_t result;
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<scalar_t, float16>) {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
      return result;
    }
#endif
    result.bits = static_cast<uint16_t>(bits_of<scalar_t>::narrow(value));
    return result;
  }
}

// Narrows two values into one word. The first one is in the low half.
template <class scalar_t>
FUSEDOPT_INLINE uint32_t narrow_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  if constexpr (std::is_same_v<scalar_t, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
#else
  return narrow<scalar_t>(first).bits | static_cast<uint32_t>(narrow<scalar_t>(second).bits) << 16;
#endif
}

// widen(narrow(value)). Host compilers vectorize this version, but not one with a 16-bit type in
// between.
template <class scalar_t>
FUSEDOPT_INLINE opmath_t<scalar_t> round_to(opmath_t<scalar_t> value) {
  if constexpr (sizeof(scalar_t) == sizeof(value)) {
    return value;
  } else {
    return bits_of<scalar_t>::widen(bits_of<scalar_t>::narrow(value));
  }
}

}  // namespace fusedopt
