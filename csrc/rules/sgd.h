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
  return c.nesterov != 0 ? grad + c.momentum * momentum_buffer : momentum_buffer;
}

struct SGD : RuleDefaults {
  static constexpr const char* kName = "sgd";

  struct Hyperparameters {
    double lr, momentum, dampening, weight_decay, nesterov, maximize;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"momentum", &Hyperparameters::momentum},
      {"dampening", &Hyperparameters::dampening, 1, nullptr, /*any_sign=*/true},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"nesterov", &Hyperparameters::nesterov},
      {"maximize", &Hyperparameters::maximize}};

  static constexpr StateName kScalars[] = {{"momentum_steps"}};  // torch keeps no such state
  static constexpr StateName kStates[] = {{"momentum_buffer", 0, Coding::kLinear}};
  enum : unsigned { kNone = 0b0, kMomentumBuffer = 0b1 };
  static constexpr unsigned kVariants[] = {kNone, kMomentumBuffer};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters& h) {
    return h.momentum != 0 ? kMomentumBuffer : kNone;
  }

  template <class T>
  struct Coefficients {
    T lr, momentum, grad_share, nesterov, weight_decay;
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars) {
    const bool first = scalars[0] == 1;  // the buffer, still zero, becomes the whole gradient
    return {h.lr, h.momentum, first ? 1 : 1 - h.dampening, h.nesterov, h.weight_decay};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned used, const Coefficients<T>& c, T grad, T param,
                                     T& momentum_buffer) {
    grad = with_l2(grad, c.weight_decay, param);
    return with_momentum((used & kMomentumBuffer) != 0, c, grad, momentum_buffer);
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param - c.lr * direction;
  }
};

}  // namespace fusedopt
