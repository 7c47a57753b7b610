// The two norms: how a norm pass turns values into terms and combines partial results.
#pragma once

#include <cmath>

#include "math/inline.h"

namespace fusedopt {

// Both start from 0, which changes no other result. add(total, value) gives the same bits as
// combine(total, term(value)); use it only where the processor always has FMA.
struct SumOfSquares {
  static FUSEDOPT_INLINE double term(double value) { return value * value; }
  static FUSEDOPT_INLINE double combine(double a, double b) { return a + b; }
  // The square of a float32 is exact in float64, so that FMA rounds once, as `combine` does.
  static FUSEDOPT_INLINE double add(double total, float value) {
    return std::fma(static_cast<double>(value), static_cast<double>(value), total);
  }
  static FUSEDOPT_INLINE double add(double total, double value) {
    return combine(total, term(value));
  }
};

struct MaxAbs {
  static FUSEDOPT_INLINE double term(double value) { return std::fabs(value); }
  // If a or b is nan, the result is nan.
  static FUSEDOPT_INLINE double combine(double a, double b) { return a > b || a != a ? a : b; }
  static FUSEDOPT_INLINE double add(double total, double value) {
    return combine(total, term(value));
  }
};

}  // namespace fusedopt
