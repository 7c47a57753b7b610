// Gradient descent, with momentum (Polyak, 1964) or Nesterov's (Sutskever et al., 2013).
#pragma once

#include "math/inline.h"
#include "rules/rule.h"

namespace fusedopt {

struct SGD {
  static constexpr const char* kName = "sgd";

  struct Hyperparameters {
    double lr, momentum, dampening, weight_decay, nesterov, maximize;
  };
  static constexpr HyperparameterName kHyperparameters[] = {
      {"lr"}, {"momentum"}, {"dampening"}, {"weight_decay"}, {"nesterov"}, {"maximize"}};

  static constexpr const char* kScalars[] = {"momentum_steps"};
  static constexpr const char* kStates[] = {"momentum_buffer"};
  enum : unsigned { kNone = 0b0, kMomentumBuffer = 0b1 };
  static constexpr unsigned kVariants[] = {kNone, kMomentumBuffer};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters& h) {
    return h.momentum != 0 ? kMomentumBuffer : kNone;
  }

  static FUSEDOPT_INLINE void advance(const Hyperparameters&, float* scalars) { scalars[0] += 1; }

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
  static FUSEDOPT_INLINE void update(unsigned used, const Coefficients<T>& c, T grad, T& param,
                                     T& momentum_buffer) {
    grad = c.weight_decay != 0 ? grad + c.weight_decay * param : grad;
    T direction = grad;
    if ((used & kMomentumBuffer) != 0) {
      momentum_buffer = c.momentum * momentum_buffer + c.grad_share * grad;
      direction = c.nesterov != 0 ? grad + c.momentum * momentum_buffer : momentum_buffer;
    }
    param = param - c.lr * direction;
  }
};

}  // namespace fusedopt
