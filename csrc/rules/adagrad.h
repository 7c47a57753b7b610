// Adagrad (Duchi, Hazan and Singer, 2011).
#pragma once

#include <cmath>

#include "math/inline.h"
#include "rules/rule.h"

namespace fusedopt {

struct Adagrad : RuleDefaults {
  static constexpr const char* kName = "adagrad";

  struct Hyperparameters {
    double lr, lr_decay, eps, weight_decay, maximize, initial_accumulator_value;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"lr_decay", &Hyperparameters::lr_decay},
      {"eps", &Hyperparameters::eps},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"maximize", &Hyperparameters::maximize},
      // The first values: see the rule's Python class.
      {"initial_accumulator_value", &Hyperparameters::initial_accumulator_value}};

  static constexpr StateName kScalars[] = {{"step"}};
  static constexpr StateName kStates[] = {{"sum"}};
  enum : unsigned { kSum = 0b1 };
  static constexpr unsigned kVariants[] = {kSum};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return kSum; }

  template <class T>
  struct Coefficients {
    T step_size, eps, weight_decay;
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars) {
    return {h.lr / (1 + (scalars[0] - 1.0) * h.lr_decay), h.eps, h.weight_decay};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>& c, T grad, T param, T& sum) {
    grad = with_l2(grad, c.weight_decay, param);
    sum = sum + grad * grad;
    return grad / (std::sqrt(sum) + c.eps);
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param - c.step_size * direction;
  }
};

}  // namespace fusedopt
