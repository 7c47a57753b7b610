// What Adam and its family share: weight decay, then the averages of the gradient and of its
// square.
#pragma once

#include "math/inline.h"

namespace fusedopt {

// `grad` and `param` come back with the weight decay in them.
template <class Coefficients, class T>
FUSEDOPT_INLINE void update_moments(const Coefficients& c, T& grad, T& param, T& exp_avg,
                                    T& exp_avg_sq) {
  grad = c.l2 != 0 ? grad + c.l2 * param : grad;
  param = param * c.decay;
  exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * grad;
  exp_avg_sq = c.beta2 * exp_avg_sq + (c.one_minus_beta2 * grad) * grad;
}

}  // namespace fusedopt
