// base ** exponent by repeated squaring. libm's pow gives other bits on the host, on the device and
// in Python.
#pragma once

#include <cstdint>

#include "math/inline.h"

namespace fusedopt {

FUSEDOPT_INLINE double power(double base, uint64_t exponent) {
  double result = 1;
  for (; exponent != 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

}  // namespace fusedopt
