// What a norm pass does with values and partial results: the sum of squares, the largest magnitude.
#pragma once

#include <cmath>

#include "math/inline.h"

namespace fusedopt {

// Both start from 0, which leaves any other result as it is. add(total, value), for processors that
// have FMA for certain, is combine(total, term(value)).
struct SumOfSquares {
  static FUSEDOPT_INLINE double term(double value) { return value * value; }
  static FUSEDOPT_INLINE double combine(double a, double b) { return a + b; }
  // The square of a float32 is exact in float64: it is one rounding either way.
  static FUSEDOPT_INLINE double add(double total, float value) {
    return std::fma(static_cast<double>(value), static_cast<double>(value), total);
  }
  static FUSEDOPT_INLINE double add(double total, double value) {
    return combine(total, term(value));
  }
};

struct MaxAbs {
  static FUSEDOPT_INLINE double term(double value) { return std::fabs(value); }
  // nan, from either side, stays nan.
  static FUSEDOPT_INLINE double combine(double a, double b) { return a > b || a != a ? a : b; }
  static FUSEDOPT_INLINE double add(double total, double value) {
    return combine(total, term(value));
  }
};

}  // namespace fusedopt
