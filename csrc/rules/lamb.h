// LAMB: Adam with a learning rate by tensor, and decoupled weight decay (You et al., 2020).
#pragma once

#include <cmath>
#include <cstdint>

#include "math/inline.h"
#include "math/power.h"
#include "rules/rule.h"

namespace fusedopt {

struct LAMB : RuleDefaults {
  static constexpr const char* kName = "lamb";

  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay, bias_correction, trust_clip, always_adapt, maximize;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"betas", &Hyperparameters::beta1, 2},
      {"eps", &Hyperparameters::eps},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"bias_correction", &Hyperparameters::bias_correction},
      {"trust_clip", &Hyperparameters::trust_clip},
      {"always_adapt", &Hyperparameters::always_adapt},
      {"maximize", &Hyperparameters::maximize}};

  static constexpr StateName kScalars[] = {{"step"}};
  static constexpr StateName kStates[] = {{"exp_avg", 0, Coding::kLinear},
                                          {"exp_avg_sq", 0, Coding::kRoot}};
  enum : unsigned { kMoments = 0b11 };
  static constexpr unsigned kVariants[] = {kMoments};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return kMoments; }

  // The terms are the directions. The second pass computes them again.
  static constexpr bool kHasTrustRatio = true;
  static constexpr unsigned kTrustStates = kMoments;

  template <class T>
  struct Coefficients {
    T beta1, one_minus_beta1, beta2, one_minus_beta2;
    T inv_bias_correction1, inv_sqrt_bias_correction2, eps, weight_decay, step_size;
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars,
                                                           double trust_ratio) {
    const uint64_t step = static_cast<uint64_t>(scalars[0]);
    const bool corrects = h.bias_correction != 0;
    return {h.beta1,
            1 - h.beta1,
            h.beta2,
            1 - h.beta2,
            corrects ? 1 / (1 - power(h.beta1, step)) : 1,
            corrects ? 1 / std::sqrt(1 - power(h.beta2, step)) : 1,
            h.eps,
            h.weight_decay,
            h.lr * trust_ratio};
  }

  template <class T>
  static FUSEDOPT_INLINE T trust_term(unsigned used, const Coefficients<T>& c, T grad, T param,
                                      T& exp_avg, T& exp_avg_sq) {
    update_moments(c, grad, exp_avg, exp_avg_sq);
    return direction(used, c, grad, param, exp_avg, exp_avg_sq);
  }

  static FUSEDOPT_INLINE double trust_ratio(const Hyperparameters& h, const TrustNorms& norms) {
    if (h.weight_decay == 0 && h.always_adapt == 0) return 1;
    if (!(norms.params > 0 && norms.terms > 0)) return 1;
    const double ratio = norms.params / norms.terms;
    return h.trust_clip != 0 && ratio > 1 ? 1 : ratio;
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>& c, T, T param, T& exp_avg,
                                     T& exp_avg_sq) {
    const T denom = std::sqrt(exp_avg_sq) * c.inv_sqrt_bias_correction2 + c.eps;
    return with_l2(exp_avg * c.inv_bias_correction1 / denom, c.weight_decay, param);
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param - c.step_size * direction;
  }
};

}  // namespace fusedopt
