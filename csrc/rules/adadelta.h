// Adadelta (Zeiler, 2012).
#pragma once

#include <cmath>

#include "math/inline.h"
#include "rules/rule.h"

namespace fusedopt {

struct Adadelta : RuleDefaults {
  static constexpr const char* kName = "adadelta";

  struct Hyperparameters {
    double lr, rho, eps, weight_decay, maximize;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"rho", &Hyperparameters::rho},
      {"eps", &Hyperparameters::eps},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"maximize", &Hyperparameters::maximize}};

  static constexpr StateName kScalars[] = {{"step"}};
  static constexpr StateName kStates[] = {{"square_avg", 0, Coding::kRoot},
                                          {"acc_delta", 0, Coding::kRoot}};
  enum : unsigned { kAverages = 0b11 };
  static constexpr unsigned kVariants[] = {kAverages};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return kAverages; }

  template <class T>
  struct Coefficients {
    T lr, rho, one_minus_rho, eps, weight_decay;
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h, const float*) {
    return {h.lr, h.rho, 1 - h.rho, h.eps, h.weight_decay};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>& c, T grad, T param,
                                     T& square_avg, T& acc_delta) {
    grad = with_l2(grad, c.weight_decay, param);
    square_avg = c.rho * square_avg + (c.one_minus_rho * grad) * grad;
    const T delta = std::sqrt(acc_delta + c.eps) / std::sqrt(square_avg + c.eps) * grad;
    acc_delta = c.rho * acc_delta + (c.one_minus_rho * delta) * delta;
    return delta;
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param - c.lr * direction;
  }
};

}  // namespace fusedopt
