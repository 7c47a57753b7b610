// RMSprop (Tieleman and Hinton, 2012), centered as in Graves (2013), with momentum.
#pragma once

#include <cmath>

#include "math/inline.h"
#include "rules/rule.h"

namespace fusedopt {

struct RMSprop : RuleDefaults {
  static constexpr const char* kName = "rmsprop";

  struct Hyperparameters {
    double lr, alpha, eps, weight_decay, momentum, centered, maximize;
    double eps_in_sqrt, lr_in_momentum, decoupled_weight_decay;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"alpha", &Hyperparameters::alpha},
      {"eps", &Hyperparameters::eps},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"momentum", &Hyperparameters::momentum},
      {"centered", &Hyperparameters::centered},
      {"maximize", &Hyperparameters::maximize},
      optional("eps_in_sqrt", &Hyperparameters::eps_in_sqrt),
      optional("lr_in_momentum", &Hyperparameters::lr_in_momentum),
      optional("decoupled_weight_decay", &Hyperparameters::decoupled_weight_decay)};

  static constexpr StateName kScalars[] = {{"step"}};
  static constexpr StateName kStates[] = {
      {"square_avg", 0, Coding::kRoot}, {"grad_avg"}, {"momentum_buffer", 0, Coding::kLinear}};
  enum : unsigned { kSquareAvg = 0b001, kGradAvg = 0b010, kMomentumBuffer = 0b100 };
  static constexpr unsigned kVariants[] = {kSquareAvg, kSquareAvg | kGradAvg,
                                           kSquareAvg | kMomentumBuffer,
                                           kSquareAvg | kGradAvg | kMomentumBuffer};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters& h) {
    unsigned used = kSquareAvg;
    if (h.centered != 0) used |= kGradAvg;
    if (h.momentum > 0) used |= kMomentumBuffer;
    return used;
  }

  template <class T>
  struct Coefficients {
    T lr, alpha, one_minus_alpha, momentum;
    T eps_in_sqrt, eps;
    T direction_share;  // of the direction, in the momentum
    T l2, decay;        // l2: weight decay added to the gradient; decay: factor of the parameter
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h, const float*) {
    const bool in_sqrt = h.eps_in_sqrt != 0, decoupled = h.decoupled_weight_decay != 0;
    const bool lr_in_momentum = h.lr_in_momentum != 0 && h.momentum > 0;
    return {lr_in_momentum ? 1 : h.lr,
            h.alpha,
            1 - h.alpha,
            h.momentum,
            in_sqrt ? h.eps : 0,
            in_sqrt ? 0 : h.eps,
            lr_in_momentum ? h.lr : 1,
            decoupled ? 0 : h.weight_decay,
            decoupled ? 1 - h.lr * h.weight_decay : 1};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned used, const Coefficients<T>& c, T grad, T param,
                                     T& square_avg, T& grad_avg, T& momentum_buffer) {
    grad = with_l2(grad, c.l2, param);
    square_avg = c.alpha * square_avg + (c.one_minus_alpha * grad) * grad;
    T variance = square_avg;
    if ((used & kGradAvg) != 0) {
      grad_avg = c.alpha * grad_avg + c.one_minus_alpha * grad;
      variance = square_avg - grad_avg * grad_avg;
      variance = variance < 0 ? T(0) : variance;  // rounding can push a zero variance below zero
    }
    T direction = grad / (std::sqrt(variance + c.eps_in_sqrt) + c.eps);
    if ((used & kMomentumBuffer) != 0) {
      momentum_buffer = c.momentum * momentum_buffer + c.direction_share * direction;
      direction = momentum_buffer;
    }
    return direction;
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param * c.decay - c.lr * direction;
  }
};

}  // namespace fusedopt
