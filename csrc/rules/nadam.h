// NAdam: Adam with Nesterov momentum (Dozat, 2016), with decoupled weight decay as in AdamW.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/inline.h"
#include "math/power.h"
#include "rules/rule.h"

namespace fusedopt {

struct NAdam : RuleDefaults {
  static constexpr const char* kName = "nadam";

  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay;
    double mu_base;  // 0.96 ** momentum_decay
    double maximize, decoupled_weight_decay;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"betas", &Hyperparameters::beta1, 2},
      {"eps", &Hyperparameters::eps},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"momentum_decay", &Hyperparameters::mu_base, 1,
       [](double decay) { return std::pow(0.96, decay); }},
      {"maximize", &Hyperparameters::maximize},
      {"decoupled_weight_decay", &Hyperparameters::decoupled_weight_decay}};

  static constexpr StateName kScalars[] = {{"step"}, {"mu_product", 1}};
  static constexpr StateName kStates[] = {{"exp_avg", 0, Coding::kLinear},
                                          {"exp_avg_sq", 0, Coding::kRoot}};
  enum : unsigned { kMoments = 0b11 };
  static constexpr unsigned kVariants[] = {kMoments};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return kMoments; }

  // The momentum at this step.
  static FUSEDOPT_INLINE double mu(const Hyperparameters& h, uint64_t step) {
    return h.beta1 * (1 - 0.5 * power(h.mu_base, step));
  }

  static FUSEDOPT_INLINE void advance(const Hyperparameters& h, float* scalars) {
    scalars[0] += 1;
    scalars[1] *= static_cast<float>(mu(h, static_cast<uint64_t>(scalars[0])));
  }

  template <class T>
  struct Coefficients {
    T beta1, one_minus_beta1, beta2, one_minus_beta2;
    T grad_step_size, exp_avg_step_size, inv_sqrt_bias_correction2, eps;
    T l2, decay;  // l2: weight decay added to the gradient; decay: factor of the parameter
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars) {
    const uint64_t step = static_cast<uint64_t>(scalars[0]);
    const double mu_product = scalars[1];
    const double mu_next = mu(h, step + 1);
    const double bias_correction2 = 1 - power(h.beta2, step);
    const bool decoupled = h.decoupled_weight_decay != 0;
    return {h.beta1,
            1 - h.beta1,
            h.beta2,
            1 - h.beta2,
            h.lr * (1 - mu(h, step)) / (1 - mu_product),
            h.lr * mu_next / (1 - mu_product * mu_next),
            1 / std::sqrt(bias_correction2),
            h.eps,
            decoupled ? 0 : h.weight_decay,
            decoupled ? 1 - h.lr * h.weight_decay : 1};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>& c, T grad, T param,
                                     T& exp_avg, T& exp_avg_sq) {
    grad = with_l2(grad, c.l2, param);
    update_moments(c, grad, exp_avg, exp_avg_sq);
    const T denom = std::sqrt(exp_avg_sq) * c.inv_sqrt_bias_correction2 + c.eps;
    return (c.grad_step_size * grad + c.exp_avg_step_size * exp_avg) / denom;
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param * c.decay - direction;
  }
};

}  // namespace fusedopt
