// The exact sum of float64 numbers that are not negative. They may come in any order: they are
// added as integers, and the sum is rounded once.
//
// A finite float64 is a multiple of 2^-1074. The sum is an integer of that unit. It is kept in
// kLimbs limbs of 32 bits, the lowest first. A limb is stored in 64 bits, so that 2^30 numbers can
// be added before the carries are propagated.
#pragma once

#include <cstdint>

#include "math/convert.h"
#include "math/inline.h"

namespace fusedopt {

inline constexpr int kLimbs = 70;
inline constexpr int kLimbBits = 32;
inline constexpr uint64_t kLimbMask = 0xffffffffu;

FUSEDOPT_INLINE bool is_finite(double value) { return value - value == 0; }

// The parts of a number. parts[k] is added to the limb first + k.
struct LimbParts {
  int first;
  uint64_t parts[3];

  FUSEDOPT_INLINE explicit LimbParts(double number) {
    constexpr int kFraction = 52;
    const uint64_t bits = bit_cast<uint64_t>(number);
    const int exponent = static_cast<int>(bits >> kFraction);
    const uint64_t implied = exponent > 0 ? uint64_t{1} << kFraction : 0;
    const uint64_t mantissa = (bits & ((uint64_t{1} << kFraction) - 1)) | implied;
    const int shift = exponent > 0 ? exponent - 1 : 0;
    first = shift / kLimbBits;
    const uint64_t low = (mantissa & kLimbMask) << shift % kLimbBits;
    const uint64_t high = (mantissa >> kLimbBits) << shift % kLimbBits;
    parts[0] = low & kLimbMask;
    parts[1] = (low >> kLimbBits) + (high & kLimbMask);
    parts[2] = high >> kLimbBits;
  }
};

// The number of units `leading`, times 2^exponent, plus less than one unit if `more` is set,
// rounded to the nearest float64, ties to even. The highest bit of `leading` is set.
FUSEDOPT_INLINE double round_units(uint64_t leading, int exponent, bool more) {
  constexpr int kDropped = 11;  // 64 bits - 53 bits
  constexpr uint64_t kHalf = uint64_t{1} << (kDropped - 1);
  const uint64_t rest = leading & (2 * kHalf - 1);
  const uint64_t mantissa = leading >> kDropped;
  const bool up = rest > kHalf || (rest == kHalf && (more || (mantissa & 1) != 0));
  const uint64_t biased = static_cast<uint64_t>(exponent + kDropped + 1);
  constexpr uint64_t kInfinity = uint64_t{0x7ff} << 52;
  // The implied bit of the mantissa and a carry of the rounding both add 1 to the exponent.
  const uint64_t bits = ((biased - 1) << 52) + mantissa + (up ? 1 : 0);
  return bit_cast<double>(biased >= 0x7ff || bits > kInfinity ? kInfinity : bits);
}

// The sum that the limbs stand for, rounded to the nearest float64. Propagates their carries.
template <class limb_t>
FUSEDOPT_INLINE double round_limbs(limb_t* limbs) {
  static_assert(sizeof(limb_t) == sizeof(uint64_t), "a limb is stored in 64 bits");
  uint64_t carry = 0;
  int top = 0;
  for (int i = 0; i < kLimbs; ++i) {
    const uint64_t value = limbs[i] + carry;
    limbs[i] = value & kLimbMask;
    carry = value >> kLimbBits;
    if (limbs[i] != 0) top = i;
  }
  // Below 2^53 units, the units are the bits of a float64, subnormal or not.
  if (top == 0) return bit_cast<double>(static_cast<uint64_t>(limbs[0]));
  uint64_t leading = limbs[top] << kLimbBits | limbs[top - 1];  // in units of 2^(32 (top - 1))
  const uint64_t lowest = top > 1 ? limbs[top - 2] : 0;
  if (top == 1 && leading >> 53 == 0) return bit_cast<double>(leading);
  int shift = 0;
  while (leading >> 63 == 0) {
    leading <<= 1;
    ++shift;
  }
  const uint64_t next = lowest << shift;  // shift <= 31: the highest limb is not zero
  leading |= next >> kLimbBits;
  bool more = (next & kLimbMask) != 0;
  for (int i = 0; i < top - 2; ++i) more = more || limbs[i] != 0;
  return round_units(leading, kLimbBits * (top - 1) - shift, more);
}

// An exact sum of one thread. If a number is inf or nan, so is the sum.
class ExactSum {
 public:
  FUSEDOPT_INLINE void add(double number) {
    if (!is_finite(number)) {
      nonfinite_ += number;
      return;
    }
    const LimbParts parts(number);
    for (int k = 0; k < 3; ++k) limbs_[parts.first + k] += parts.parts[k];
  }

  FUSEDOPT_INLINE double result() { return nonfinite_ == 0 ? round_limbs(limbs_) : nonfinite_; }

 private:
  uint64_t limbs_[kLimbs] = {};
  double nonfinite_ = 0;
};

}  // namespace fusedopt
