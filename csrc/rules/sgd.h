// Gradient descent, with momentum (Polyak, 1964) or Nesterov's (Sutskever et al., 2013).
#pragma once

#include "math/inline.h"
#include "rules/rule.h"

namespace fusedopt {

// Adds the gradient to the buffer, if there is one. Returns the direction. LARS shares it.
template <class Coefficients, class T>
FUSEDOPT_INLINE T with_momentum(bool has_buffer, const Coefficients& c, T grad,
                                T& momentum_buffer) {
  if (!has_buffer) return grad;
  momentum_buffer = c.momentum * momentum_buffer + c.grad_share * grad;
  return c.nesterov != 0 ? c.nesterov_share * grad + c.momentum * momentum_buffer : momentum_buffer;
}

struct SGD : RuleDefaults {
  static constexpr const char* kName = "sgd";

  struct Hyperparameters {
    double lr, momentum, dampening, weight_decay, nesterov, maximize;
    double lr_in_momentum;  // momentum_buffer is what is added to the parameter
    double decoupled_weight_decay;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"momentum", &Hyperparameters::momentum},
      {"dampening", &Hyperparameters::dampening, 1, nullptr, /*any_sign=*/true},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"nesterov", &Hyperparameters::nesterov},
      {"maximize", &Hyperparameters::maximize},
      optional("lr_in_momentum", &Hyperparameters::lr_in_momentum),
      optional("decoupled_weight_decay", &Hyperparameters::decoupled_weight_decay)};

  static constexpr StateName kScalars[] = {{"momentum_steps"}};  // torch keeps no such state
  static constexpr StateName kStates[] = {{"momentum_buffer", 0, Coding::kLinear}};
  enum : unsigned { kNone = 0b0, kMomentumBuffer = 0b1 };
  static constexpr unsigned kVariants[] = {kNone, kMomentumBuffer};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters& h) {
    return h.momentum != 0 ? kMomentumBuffer : kNone;
  }

  template <class T>
  struct Coefficients {
    T lr, momentum, nesterov;
    T grad_share, nesterov_share;  // of the gradient: in the buffer, beside the buffer
    T l2, decay;  // l2: weight decay added to the gradient; decay: factor of the parameter
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars) {
    const bool first = scalars[0] == 1;  // the buffer, still zero, becomes the whole gradient
    const bool lr_in_momentum = h.lr_in_momentum != 0 && h.momentum != 0;
    const bool decoupled = h.decoupled_weight_decay != 0;
    const double share = lr_in_momentum ? -h.lr : 1;
    return {lr_in_momentum ? -1 : h.lr,
            h.momentum,
            h.nesterov,
            first ? share : share * (1 - h.dampening),
            share,
            decoupled ? 0 : h.weight_decay,
            decoupled ? 1 - h.lr * h.weight_decay : 1};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned used, const Coefficients<T>& c, T grad, T param,
                                     T& momentum_buffer) {
    grad = with_l2(grad, c.l2, param);
    return with_momentum((used & kMomentumBuffer) != 0, c, grad, momentum_buffer);
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param * c.decay - c.lr * direction;
  }
};

}  // namespace fusedopt
