// The contract of a rule. A rule is an optimizer's formula; it declares:
//
//   kName             the name that find_rule() takes
//   Hyperparameters   a struct of doubles
//   kHyperparameters  the options of a param group, and the fields that they fill
//   kStates           the arrays that the rule keeps per parameter, shaped as the parameter, and
//                     how each can be stored in 8 bits
//   kScalars          the numbers that the rule keeps per parameter; the first counts its steps
//   kVariants         all sets of states that options can select
//   states_used(h)    the set that these hyperparameters select
//   kHasLr            whether h.lr exists; the learning rate may be a tensor on the device
//   kHasMaximize      whether h.maximize exists; if it is set, the kernels negate the gradient
//   advance           changes the scalars to those of this step
//   prepare_next      changes the scalars, after coefficients() has read them, for the next step
//   coefficients      the numbers that all elements of a tensor share in a step, in float64
//   direction         turns the gradient into the direction of the update; updates the states
//   apply             moves the parameter along the direction
//
// A rule with a trust ratio, a factor by tensor (see core/trust.h), also declares:
//
//   kHasTrustRatio    true; coefficients() gets the tensor's ratio as a third argument, which is 1
//                     in the first pass
//   kTrustStates      the states that the first pass updates. If there are any, the second pass
//                     gets no gradient and only reads these states; else it updates all states
//   kTrustReads       the states that the first pass reads and doesn't change
//   kTrustReadsParams whether the first pass reads the parameters. If not, trust_term() gets 0 in
//                     their place, and TrustNorms::params is 0
//   trust_term        updates the kTrustStates, and returns the element whose square is summed up
//   trust_ratio       the ratio, from the TrustNorms, in float64
#pragma once

#include <cmath>

#include "math/blocks.h"
#include "math/inline.h"

namespace fusedopt {

// An option of a param group, and the fields of Hyperparameters that it fills.
template <class Hyperparameters>
struct Option {
  const char* name;
  double Hyperparameters::* first;
  int count = 1;  // how many fields; `betas` fills two
  // Null, or a function that the host applies to each number. libm's functions give other bits on
  // the device.
  double (*on_host)(double) = nullptr;
  bool any_sign = false;  // else a number below 0 is refused
  bool optional = false;  // a group without it has 0
};

// An option that torch's class doesn't have: for formulas of other libraries.
template <class Hyperparameters>
constexpr Option<Hyperparameters> optional(const char* name, double Hyperparameters::* field) {
  return {name, field, 1, nullptr, false, true};
}

// A state or a scalar of a parameter, and its first value. A state without a coding can't be stored
// in 8 bits; nor can the other states of a variant that uses it.
struct StateName {
  const char* name;
  double first_value = 0;
  Coding coding = Coding::kNone;
};

// The norms of a tensor's parameters and terms, and the number of its elements.
struct TrustNorms {
  double params, terms, numel;
};

// The trust ratio of cautious steps: one over the share of the elements that move. Their terms are
// 1, those of the others 0.
FUSEDOPT_INLINE double inverse_share(const TrustNorms& norms) {
  const double share = std::round(norms.terms * norms.terms) / norms.numel;
  return 1 / (share > 1e-3 ? share : 1e-3);
}

// Declarations that most rules share.
struct RuleDefaults {
  static constexpr bool kHasLr = true;
  static constexpr bool kHasMaximize = true;
  static constexpr bool kHasTrustRatio = false, kIsTrustPass = false;
  static constexpr unsigned kTrustStates = 0, kTrustReads = 0;
  static constexpr bool kTrustReadsParams = true;

  template <class Hyperparameters>
  static FUSEDOPT_INLINE void advance(const Hyperparameters&, float* scalars) {
    scalars[0] += 1;
  }

  template <class Hyperparameters>
  static FUSEDOPT_INLINE void prepare_next(const Hyperparameters&, float*) {}
};

// Adds weight decay to the gradient (L2 regularization).
template <class T>
FUSEDOPT_INLINE T with_l2(T grad, T weight_decay, T param) {
  return weight_decay != 0 ? grad + weight_decay * param : grad;
}

// 1, -1 or 0; 0 of nan.
template <class T>
FUSEDOPT_INLINE T sign_of(T value) {
  return static_cast<T>(value > 0) - static_cast<T>(value < 0);
}

// Whether a cautious step (Liang et al., 2024) moves an element: 1, or 0 if its update has another
// sign than its gradient, or if one of them is 0. The signs are compared, as a product may vanish.
template <class T>
FUSEDOPT_INLINE T agrees(T update, T grad) {
  return static_cast<T>(sign_of(update) * sign_of(grad) > 0);
}

// Updates the averages of the gradient and of its square. Adam and NAdam share them.
template <class Coefficients, class T>
FUSEDOPT_INLINE void update_moments(const Coefficients& c, T grad, T& exp_avg, T& exp_avg_sq) {
  exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * grad;
  exp_avg_sq = c.beta2 * exp_avg_sq + (c.one_minus_beta2 * grad) * grad;
}

// Updates one element. `grad` is already unscaled and clipped.
template <class Rule, class T, class... State>
FUSEDOPT_INLINE void update_element(unsigned used, const typename Rule::template Coefficients<T>& c,
                                    T grad, T& param, State&... states) {
  const T direction = Rule::direction(used, c, grad, param, states...);
  param = Rule::apply(c, param, direction);
}

}  // namespace fusedopt
