// The message of a step over ranks: int64 numbers that ranks and devices add up. Integers add up to
// the same bits in any order. fusedopt/reference/message.py has the specification.
#pragma once

#include <cstdint>

#include "core/decision.h"
#include "core/exact_sum.h"

namespace fusedopt {

// The limbs of the exact sum of squares come first, then these counts.
inline constexpr const char* kMessageCounts[] = {
    "infs",     "nans",     "found_inf", "wide",           "sharded",
    "refusals", "refusing", "digest",    "digest_squared", "ranks"};
enum MessageSlot : int {
  kInfs = kLimbs,
  kNans,
  kFoundInf,
  kWide,
  kSharded,
  kRefusals,
  kRefusing,
  kDigest,
  kDigestSquared,
  kRanks,
  kMessageSize,
};
static_assert(kMessageSize == kLimbs + sizeof(kMessageCounts) / sizeof(*kMessageCounts),
              "every slot has a name");

// Whether all ranks were asked for the same step: by Cauchy and Schwarz, the two sums fit together
// only if all digests are equal.
FUSEDOPT_INLINE bool is_agreed(const int64_t* total) {
  const uint64_t sum = static_cast<uint64_t>(total[kDigest]);
  const uint64_t squares = static_cast<uint64_t>(total[kDigestSquared]);
  return static_cast<uint64_t>(total[kRanks]) * squares == sum * sum;
}

// Reads the total of all ranks: the sum of squares, and whether the step is to be skipped because a
// rank asks for it or can't take the step. `limbs` is a copy of the total's, and is overwritten.
FUSEDOPT_INLINE void read_message(const int64_t* total, uint64_t* limbs, double* sum_of_squares,
                                  float* skip) {
  double sum = round_limbs(limbs);
  if (total[kInfs] != 0) sum = bit_cast<double>(uint64_t{0x7ff} << 52);
  if (total[kNans] != 0) sum = bit_cast<double>(uint64_t{0xfff} << 51);
  *sum_of_squares = sum;
  *skip = total[kFoundInf] != 0 || total[kRefusals] != 0 || !is_agreed(total) ? 1.0f : 0.0f;
}

}  // namespace fusedopt
