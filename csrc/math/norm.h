// The two norms: how a norm pass turns values into terms and combines partial results.
#pragma once

#include <cmath>

#include "math/inline.h"

namespace fusedopt {

// A sum of squares in float32 lanes counts if it is finite and not below this number. Otherwise
// some squares may have overflowed, or vanished, and the chunk is measured again in float64 lanes.
inline constexpr double kSmallestSum = 0x1p-80;

// Both start from 0, which changes no other result. T is float or double.
struct SumOfSquares {
  template <class T>
  static FUSEDOPT_INLINE T term(T value) {
    return value * value;
  }
  template <class T>
  static FUSEDOPT_INLINE T combine(T a, T b) {
    return a + b;
  }
  static FUSEDOPT_INLINE bool is_in_range(double sum) {
    return sum >= kSmallestSum && sum - sum == 0;
  }
};

struct MaxAbs {
  template <class T>
  static FUSEDOPT_INLINE T term(T value) {
    return std::fabs(value);
  }
  // If a or b is nan, the result is nan.
  template <class T>
  static FUSEDOPT_INLINE T combine(T a, T b) {
    return a > b || a != a ? a : b;
  }
  static FUSEDOPT_INLINE bool is_in_range(double) { return true; }
};

}  // namespace fusedopt
