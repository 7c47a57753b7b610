// Adamax: Adam with the infinity norm (Kingma and Ba, 2015).
#pragma once

#include <cmath>
#include <cstdint>

#include "math/inline.h"
#include "math/power.h"
#include "rules/rule.h"

namespace fusedopt {

struct Adamax : RuleDefaults {
  static constexpr const char* kName = "adamax";

  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay, maximize;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"betas", &Hyperparameters::beta1, 2},
      {"eps", &Hyperparameters::eps},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"maximize", &Hyperparameters::maximize}};

  static constexpr StateName kScalars[] = {{"step"}};
  static constexpr StateName kStates[] = {{"exp_avg", 0, Coding::kLinear}, {"exp_inf"}};
  enum : unsigned { kMoments = 0b11 };
  static constexpr unsigned kVariants[] = {kMoments};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return kMoments; }

  template <class T>
  struct Coefficients {
    T beta1, one_minus_beta1, beta2, step_size, eps, weight_decay;
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars) {
    const double bias_correction = 1 - power(h.beta1, static_cast<uint64_t>(scalars[0]));
    return {h.beta1, 1 - h.beta1, h.beta2, h.lr / bias_correction, h.eps, h.weight_decay};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>& c, T grad, T param,
                                     T& exp_avg, T& exp_inf) {
    grad = with_l2(grad, c.weight_decay, param);
    exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * grad;
    const T decayed = c.beta2 * exp_inf;
    const T magnitude = std::fabs(grad) + c.eps;
    const bool keep = decayed > magnitude || decayed != decayed;  // nan stays nan
    exp_inf = keep ? decayed : magnitude;
    return exp_avg / exp_inf;
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param - c.step_size * direction;
  }
};

}  // namespace fusedopt
