// StableAdamW: AdamW whose learning rate is divided, by tensor, by the root mean square of the
// gradients in units of their usual size, if that is above 1 (Wortsman et al., 2023).
#pragma once

#include <cmath>
#include <cstdint>

#include "math/inline.h"
#include "math/power.h"
#include "rules/rule.h"

namespace fusedopt {

struct StableAdamW : RuleDefaults {
  static constexpr const char* kName = "stable_adamw";

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
  static constexpr StateName kStates[] = {{"exp_avg", 0, Coding::kLinear},
                                          {"exp_avg_sq", 0, Coding::kRoot}};
  enum : unsigned { kMoments = 0b11 };
  static constexpr unsigned kVariants[] = {kMoments};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return kMoments; }

  static constexpr bool kHasTrustRatio = true;
  static constexpr unsigned kTrustStates = kMoments;
  static constexpr bool kTrustReadsParams = false;

  template <class T>
  struct Coefficients {
    T beta1, one_minus_beta1, beta2, one_minus_beta2;
    T inv_sqrt_bias_correction2, eps, step_size, decay;
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars,
                                                           double trust_ratio) {
    const uint64_t step = static_cast<uint64_t>(scalars[0]);
    const double lr = h.lr * trust_ratio;
    return {h.beta1,
            1 - h.beta1,
            h.beta2,
            1 - h.beta2,
            1 / std::sqrt(1 - power(h.beta2, step)),
            h.eps,
            lr / (1 - power(h.beta1, step)),
            1 - lr * h.weight_decay};
  }

  // The gradient in units of its usual size.
  template <class T>
  static FUSEDOPT_INLINE T trust_term(unsigned, const Coefficients<T>& c, T grad, T, T& exp_avg,
                                      T& exp_avg_sq) {
    update_moments(c, grad, exp_avg, exp_avg_sq);
    const T usual = std::sqrt(exp_avg_sq) * c.inv_sqrt_bias_correction2;
    return grad / (usual > c.eps ? usual : c.eps);
  }

  static FUSEDOPT_INLINE double trust_ratio(const Hyperparameters&, const TrustNorms& norms) {
    const double rms = norms.terms / std::sqrt(norms.numel);
    return rms > 1 ? 1 / rms : 1;
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>& c, T, T, T& exp_avg,
                                     T& exp_avg_sq) {
    return exp_avg / (std::sqrt(exp_avg_sq) * c.inv_sqrt_bias_correction2 + c.eps);
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param * c.decay - c.step_size * direction;
  }
};

}  // namespace fusedopt
