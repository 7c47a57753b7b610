// Averaged gradient descent (Polyak and Juditsky, 1992).
#pragma once

#include "math/inline.h"
#include "math/power.h"
#include "rules/rule.h"

namespace fusedopt {

struct ASGD : RuleDefaults {
  static constexpr const char* kName = "asgd";

  struct Hyperparameters {
    double lr, lambd, alpha, t0, weight_decay, maximize;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"lambd", &Hyperparameters::lambd, 1, nullptr, /*any_sign=*/true},
      {"alpha", &Hyperparameters::alpha, 1, nullptr, /*any_sign=*/true},
      {"t0", &Hyperparameters::t0, 1, nullptr, /*any_sign=*/true},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"maximize", &Hyperparameters::maximize}};

  static constexpr StateName kScalars[] = {{"step"}, {"eta"}, {"mu", 1}};
  static constexpr StateName kStates[] = {{"ax"}};
  enum : unsigned { kAverage = 0b1 };
  static constexpr unsigned kVariants[] = {kAverage};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return kAverage; }

  static FUSEDOPT_INLINE void prepare_next(const Hyperparameters& h, float* scalars) {
    const double step = scalars[0], averaged = step - h.t0;
    scalars[1] = static_cast<float>(h.lr / real_power(1 + h.lambd * h.lr * step, h.alpha));
    scalars[2] = static_cast<float>(1 / (averaged > 1 ? averaged : 1));
  }

  template <class T>
  struct Coefficients {
    T eta, decay, mu, weight_decay;
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars) {
    const double eta = scalars[1];
    return {eta, 1 - h.lambd * eta, scalars[2], h.weight_decay};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>& c, T grad, T param, T& ax) {
    grad = with_l2(grad, c.weight_decay, param);
    const T updated = apply(c, param, grad);
    ax = c.mu != 1 ? ax + (updated - ax) * c.mu : updated;
    return grad;
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param * c.decay - c.eta * direction;
  }
};

}  // namespace fusedopt
