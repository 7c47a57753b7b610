// What a norm pass does with values and partial results: the sum of squares, the largest magnitude.
#pragma once

#include <cmath>

#include "inline.h"

namespace fusedopt {

// Both start from 0, which leaves any other result as it is.
struct SumOfSquares {
  static FUSEDOPT_INLINE double term(double value) { return value * value; }
  static FUSEDOPT_INLINE double combine(double a, double b) { return a + b; }
};

struct Largest {
  static FUSEDOPT_INLINE double term(double value) { return std::fabs(value); }
  // nan, from either side, stays nan.
  static FUSEDOPT_INLINE double combine(double a, double b) { return a > b || a != a ? a : b; }
};

}  // namespace fusedopt
