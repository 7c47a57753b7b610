// Lion: the sign of an interpolated momentum (Chen et al., 2023), with decoupled weight decay.
#pragma once

#include "math/inline.h"
#include "rules/rule.h"

namespace fusedopt {

struct Lion : RuleDefaults {
  static constexpr const char* kName = "lion";

  struct Hyperparameters {
    double lr, beta1, beta2, weight_decay, maximize;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"betas", &Hyperparameters::beta1, 2},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"maximize", &Hyperparameters::maximize}};

  static constexpr StateName kScalars[] = {{"steps"}};  // lion-pytorch keeps no such state
  static constexpr StateName kStates[] = {{"exp_avg", 0, Coding::kLinear}};
  enum : unsigned { kExpAvg = 0b1 };
  static constexpr unsigned kVariants[] = {kExpAvg};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return kExpAvg; }

  template <class T>
  struct Coefficients {
    T beta1, one_minus_beta1, beta2, one_minus_beta2, lr, decay;
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h, const float*) {
    return {h.beta1, 1 - h.beta1, h.beta2, 1 - h.beta2, h.lr, 1 - h.lr * h.weight_decay};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>& c, T grad, T, T& exp_avg) {
    const T interpolated = c.beta1 * exp_avg + c.one_minus_beta1 * grad;
    exp_avg = c.beta2 * exp_avg + c.one_minus_beta2 * grad;
    return sign_of(interpolated);
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param * c.decay - c.lr * direction;
  }
};

}  // namespace fusedopt
