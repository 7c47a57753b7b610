// Powers by multiplications and roots alone. libm's pow and exp give other bits on the host, on the
// device and in Python.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/inline.h"

namespace fusedopt {

// By repeated squaring.
FUSEDOPT_INLINE double power(double base, uint64_t exponent) {
  double result = 1;
  for (; exponent != 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// 1 after `count` multiplications by `factor` in float32, as steps make them one after another.
// Below 2^-64 it may be anything: rules subtract it from 1 in float64.
FUSEDOPT_INLINE float product_after(int32_t count, float factor) {
  float product = 1;
  for (int32_t i = 0; i < count && product > 0x1p-64f; ++i) product *= factor;
  return product;
}

// By repeated squaring, and a root for each binary digit after the point.
FUSEDOPT_INLINE double real_power(double base, double exponent) {
  const double size = std::fabs(exponent);
  if (!(size < 9e18 && base >= 0)) return std::nan("");
  const uint64_t whole = static_cast<uint64_t>(size);
  double result = power(base, whole);
  for (double rest = size - static_cast<double>(whole); rest > 0;) {
    base = std::sqrt(base);
    rest *= 2;
    if (rest >= 1) {
      result *= base;
      rest -= 1;
    }
  }
  return exponent < 0 ? 1 / result : result;
}

// e ** exponent, for an exponent <= 0: by the series for exponent / 256, squared eight times.
FUSEDOPT_INLINE double exponential(double exponent) {
  if (!(exponent > -700)) return 0;
  const double part = exponent / 256;
  double result = 1;
  for (int k = 14; k > 0; --k) result = 1 + part * result / k;
  return power(result, 256);
}

}  // namespace fusedopt
