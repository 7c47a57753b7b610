// base ** exponent by repeated squaring: libm's pow differs between the host, the device and
// Python.
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
