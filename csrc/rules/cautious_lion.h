// Cautious Lion: an element whose update has another sign than its gradient doesn't move, and the
// others move farther (Liang et al., 2024).
#pragma once

#include "math/inline.h"
#include "rules/lion.h"
#include "rules/rule.h"

namespace fusedopt {

struct CautiousLion : Lion {
  static constexpr const char* kName = "cautious_lion";

  static constexpr bool kHasTrustRatio = true;
  static constexpr unsigned kTrustReads = kExpAvg;
  static constexpr bool kTrustReadsParams = false;

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars,
                                                           double trust_ratio) {
    Coefficients<double> c = Lion::coefficients(h, scalars);
    c.lr *= trust_ratio;
    return c;
  }

  template <class T>
  static FUSEDOPT_INLINE T trust_term(unsigned used, const Coefficients<T>& c, T grad, T param,
                                      T& exp_avg) {
    return agrees(Lion::direction(used, c, grad, param, exp_avg), grad);
  }

  static FUSEDOPT_INLINE double trust_ratio(const Hyperparameters&, const TrustNorms& norms) {
    return inverse_share(norms);
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned used, const Coefficients<T>& c, T grad, T param,
                                     T& exp_avg) {
    const T update = Lion::direction(used, c, grad, param, exp_avg);
    return update * agrees(update, grad);
  }
};

}  // namespace fusedopt
