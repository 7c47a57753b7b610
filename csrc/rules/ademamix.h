// AdEMAMix: Adam with a second, slow average of the gradient (Pagliardini, Ablin and Grangier,
// 2024), with decoupled weight decay.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/inline.h"
#include "math/power.h"
#include "rules/rule.h"

namespace fusedopt {

struct AdEMAMix : RuleDefaults {
  static constexpr const char* kName = "ademamix";

  struct Hyperparameters {
    double lr, beta1, beta2, beta3, alpha, beta3_warmup, alpha_warmup, eps, weight_decay, maximize;
    double inverse_log1, inverse_log2, inverse_log3;  // of the betas
  };
  static double inverse_log(double beta) { return 1 / std::log(beta); }
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"betas", &Hyperparameters::beta1, 3},
      {"alpha", &Hyperparameters::alpha},
      {"beta3_warmup", &Hyperparameters::beta3_warmup},
      {"alpha_warmup", &Hyperparameters::alpha_warmup},
      {"eps", &Hyperparameters::eps},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"maximize", &Hyperparameters::maximize},
      {"betas", &Hyperparameters::inverse_log1, 3, inverse_log}};

  static constexpr StateName kScalars[] = {{"step"}};
  static constexpr StateName kStates[] = {{"exp_avg_fast", 0, Coding::kLinear},
                                          {"exp_avg_slow", 0, Coding::kLinear},
                                          {"exp_avg_sq", 0, Coding::kRoot}};
  enum : unsigned { kMoments = 0b111 };
  static constexpr unsigned kVariants[] = {kMoments};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return kMoments; }

  template <class T>
  struct Coefficients {
    T beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3;
    T inv_bias_correction1, inv_sqrt_bias_correction2, alpha, eps, lr, decay;
  };

  // How much of a warm-up is done: from 0 to 1.
  static FUSEDOPT_INLINE double done(double step, double warmup) {
    return step < warmup ? step / warmup : 1;
  }

  // Between beta1 and beta3. The half-life of the slow average grows linearly.
  static FUSEDOPT_INLINE double slow_beta(const Hyperparameters& h, double step) {
    const double part = done(step, h.beta3_warmup);
    if (part >= 1) return h.beta3;
    return exponential(1 / ((1 - part) * h.inverse_log1 + part * h.inverse_log3));
  }

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars) {
    const uint64_t step = static_cast<uint64_t>(scalars[0]);
    const double beta3 = slow_beta(h, scalars[0]);
    return {h.beta1,
            1 - h.beta1,
            h.beta2,
            1 - h.beta2,
            beta3,
            1 - beta3,
            1 / (1 - power(h.beta1, step)),
            1 / std::sqrt(1 - power(h.beta2, step)),
            done(scalars[0], h.alpha_warmup) * h.alpha,
            h.eps,
            h.lr,
            1 - h.lr * h.weight_decay};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>& c, T grad, T, T& exp_avg_fast,
                                     T& exp_avg_slow, T& exp_avg_sq) {
    update_moments(c, grad, exp_avg_fast, exp_avg_sq);
    exp_avg_slow = c.beta3 * exp_avg_slow + c.one_minus_beta3 * grad;
    const T denom = std::sqrt(exp_avg_sq) * c.inv_sqrt_bias_correction2 + c.eps;
    return (exp_avg_fast * c.inv_bias_correction1 + c.alpha * exp_avg_slow) / denom;
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param * c.decay - c.lr * direction;
  }
};

}  // namespace fusedopt
