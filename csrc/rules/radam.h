// RAdam: Adam with a rectified learning rate (Liu et al., 2020), with decoupled weight decay as in
// AdamW.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/inline.h"
#include "math/power.h"
#include "rules/rule.h"

namespace fusedopt {

struct RAdam : RuleDefaults {
  static constexpr const char* kName = "radam";

  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay, maximize, decoupled_weight_decay;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"betas", &Hyperparameters::beta1, 2},
      {"eps", &Hyperparameters::eps},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"maximize", &Hyperparameters::maximize},
      {"decoupled_weight_decay", &Hyperparameters::decoupled_weight_decay}};

  static constexpr StateName kScalars[] = {{"step"}};
  static constexpr StateName kStates[] = {{"exp_avg", 0, Coding::kLinear},
                                          {"exp_avg_sq", 0, Coding::kRoot}};
  enum : unsigned { kMoments = 0b11 };
  static constexpr unsigned kVariants[] = {kMoments};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return kMoments; }

  template <class T>
  struct Coefficients {
    T beta1, one_minus_beta1, beta2, one_minus_beta2;
    T step_size, rectified, eps;  // rectified: 1 or 0, whether to divide by the second moment
    T l2, decay;  // l2: weight decay added to the gradient; decay: factor of the parameter
  };

  // The factor for the variance of the second moment, and 0 while this has too few samples.
  static FUSEDOPT_INLINE double rectification(double beta2, uint64_t step) {
    const double beta2_power = power(beta2, step);
    const double bias_correction2 = 1 - beta2_power;
    const double rho_inf = 2 / (1 - beta2) - 1;
    const double rho = rho_inf - 2 * static_cast<double>(step) * beta2_power / bias_correction2;
    if (!(rho > 5)) return 0;
    return std::sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) *
           std::sqrt(bias_correction2);
  }

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars) {
    const uint64_t step = static_cast<uint64_t>(scalars[0]);
    const double plain_step_size = h.lr / (1 - power(h.beta1, step));
    const double factor = rectification(h.beta2, step);
    const bool rectified = factor != 0;
    const bool decoupled = h.decoupled_weight_decay != 0;
    return {h.beta1,
            1 - h.beta1,
            h.beta2,
            1 - h.beta2,
            rectified ? plain_step_size * factor : plain_step_size,
            rectified ? 1.0 : 0.0,
            h.eps,
            decoupled ? 0 : h.weight_decay,
            decoupled ? 1 - h.lr * h.weight_decay : 1};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>& c, T grad, T param,
                                     T& exp_avg, T& exp_avg_sq) {
    update_moments(c, with_l2(grad, c.l2, param), exp_avg, exp_avg_sq);
    const T denom = c.rectified != 0 ? std::sqrt(exp_avg_sq) + c.eps : T(1);
    return exp_avg / denom;
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param * c.decay - c.step_size * direction;
  }
};

}  // namespace fusedopt
