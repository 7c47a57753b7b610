// Cautious AdamW: an element whose update has another sign than its gradient doesn't move, and the
// others move farther (Liang et al., 2024).
#pragma once

#include "math/inline.h"
#include "rules/adam.h"
#include "rules/rule.h"

namespace fusedopt {

// Its weight decay is decoupled: the first pass reads no parameters.
struct CautiousAdamW : Adam {
  static constexpr const char* kName = "cautious_adamw";

  static constexpr bool kHasTrustRatio = true;
  static constexpr unsigned kTrustReads = 0b1;  // exp_avg
  static constexpr bool kTrustReadsParams = false;

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars,
                                                           double trust_ratio) {
    Coefficients<double> c = Adam::coefficients(h, scalars);
    c.step_size *= trust_ratio;
    return c;
  }

  template <class T>
  static FUSEDOPT_INLINE T trust_term(unsigned, const Coefficients<T>& c, T grad, T, T& exp_avg,
                                      T& exp_avg_sq, T&) {
    update_moments(c, grad, exp_avg, exp_avg_sq);
    return agrees(exp_avg, grad);
  }

  static FUSEDOPT_INLINE double trust_ratio(const Hyperparameters&, const TrustNorms& norms) {
    return inverse_share(norms);
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned used, const Coefficients<T>& c, T grad, T param,
                                     T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq) {
    const T update = Adam::direction(used, c, grad, param, exp_avg, exp_avg_sq, max_exp_avg_sq);
    return update * agrees(exp_avg, grad);
  }
};

}  // namespace fusedopt
