// The contract of a rule: what an optimizer's formula declares of itself.
//
//   kName             as kernels.h knows it
//   Hyperparameters   doubles, and kHyperparameters: where a param group's options go in it
//   kStates           the arrays that it keeps for a parameter, shaped as the parameter
//   kScalars          the numbers that it keeps for a parameter; the first one counts its steps
//   kVariants         the sets of states that its options lead to, and states_used(h): which one
//   kHasLr            whether h.lr is there; it may be a tensor on the device
//   kHasMaximize      whether h.maximize is there; the kernels turn the gradient around then
//   advance           the scalars of the next step
//   coefficients      all that the elements of a tensor share in a step, in float64
//   direction         from the gradient to the direction of the update; it updates the states
//   apply             the parameter, moved along the direction
#pragma once

#include "math/inline.h"

namespace fusedopt {

// Where an option of a param group goes.
template <class Hyperparameters>
struct Option {
  const char* name;
  double Hyperparameters::* first;  // of the numbers that it holds
  int count = 1;                    // `betas` is a pair
  // Null, or what the host makes of the number: libm's functions differ on the device.
  double (*on_host)(double) = nullptr;
};

// A state or a scalar of a parameter, and the value that it starts from.
struct StateName {
  const char* name;
  double first_value = 0;
};

// What most rules have in common.
struct RuleDefaults {
  static constexpr bool kHasLr = true;
  static constexpr bool kHasMaximize = true;

  template <class Hyperparameters>
  static FUSEDOPT_INLINE void advance(const Hyperparameters&, float* scalars) {
    scalars[0] += 1;
  }
};

// Weight decay as a part of the gradient (L2 regularization).
template <class T>
FUSEDOPT_INLINE T with_l2(T grad, T weight_decay, T param) {
  return weight_decay != 0 ? grad + weight_decay * param : grad;
}

// The averages of the gradient and of its square, which Adam and its family share.
template <class Coefficients, class T>
FUSEDOPT_INLINE void update_moments(const Coefficients& c, T grad, T& exp_avg, T& exp_avg_sq) {
  exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * grad;
  exp_avg_sq = c.beta2 * exp_avg_sq + (c.one_minus_beta2 * grad) * grad;
}

// One element: `grad` is unscaled and clipped.
template <class Rule, class T, class... State>
FUSEDOPT_INLINE void update_element(unsigned used, const typename Rule::template Coefficients<T>& c,
                                    T grad, T& param, State&... states) {
  const T direction = Rule::direction(used, c, grad, param, states...);
  param = Rule::apply(c, param, direction);
}

}  // namespace fusedopt
