// LARS: gradient descent with a learning rate by tensor (You, Gitman and Ginsburg, 2017).
#pragma once

#include "math/inline.h"
#include "rules/rule.h"
#include "rules/sgd.h"

namespace fusedopt {

struct LARS : RuleDefaults {
  static constexpr const char* kName = "lars";

  struct Hyperparameters {
    double lr, momentum, dampening, weight_decay, nesterov, trust_coefficient, eps, trust_clip,
        always_adapt, maximize;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"momentum", &Hyperparameters::momentum},
      {"dampening", &Hyperparameters::dampening, 1, nullptr, /*any_sign=*/true},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"nesterov", &Hyperparameters::nesterov},
      {"trust_coefficient", &Hyperparameters::trust_coefficient},
      {"eps", &Hyperparameters::eps},
      {"trust_clip", &Hyperparameters::trust_clip},
      {"always_adapt", &Hyperparameters::always_adapt},
      {"maximize", &Hyperparameters::maximize}};

  static constexpr StateName kScalars[] = {{"momentum_steps"}};  // not among the states of Python
  static constexpr StateName kStates[] = {{"momentum_buffer", 0, Coding::kLinear}};
  enum : unsigned { kNone = 0b0, kMomentumBuffer = 0b1 };
  static constexpr unsigned kVariants[] = {kNone, kMomentumBuffer};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters& h) {
    return h.momentum != 0 ? kMomentumBuffer : kNone;
  }

  // The terms are the gradients.
  static constexpr bool kHasTrustRatio = true;

  template <class T>
  struct Coefficients {
    T lr, momentum, nesterov, grad_share, nesterov_share, weight_decay, trust_ratio;
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars,
                                                           double trust_ratio) {
    const bool first = scalars[0] == 1;  // the buffer, still zero, becomes the whole gradient
    return {h.lr, h.momentum,     h.nesterov, first ? 1 : 1 - h.dampening,
            1,    h.weight_decay, trust_ratio};
  }

  template <class T>
  static FUSEDOPT_INLINE T trust_term(unsigned, const Coefficients<T>&, T grad, T, T&) {
    return grad;
  }

  static FUSEDOPT_INLINE double trust_ratio(const Hyperparameters& h, const TrustNorms& norms) {
    if (h.weight_decay == 0 && h.always_adapt == 0) return 1;
    if (!(norms.params > 0 && norms.terms > 0)) return 1;
    const double ratio =
        h.trust_coefficient * norms.params / (norms.terms + h.weight_decay * norms.params + h.eps);
    if (h.trust_clip == 0) return ratio;
    return ratio < h.lr ? ratio / h.lr : 1;
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned used, const Coefficients<T>& c, T grad, T param,
                                     T& momentum_buffer) {
    grad = with_l2(grad, c.weight_decay, param) * c.trust_ratio;
    return with_momentum((used & kMomentumBuffer) != 0, c, grad, momentum_buffer);
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param - c.lr * direction;
  }
};

}  // namespace fusedopt
