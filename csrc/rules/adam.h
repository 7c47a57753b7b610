// Adam (Kingma and Ba, 2015), with AMSGrad (Reddi, Kale and Kumar, 2018) and decoupled weight decay
// (AdamW: Loshchilov and Hutter, 2019).
#pragma once

#include <cmath>
#include <cstdint>

#include "math/inline.h"
#include "math/power.h"
#include "rules/rule.h"

namespace fusedopt {

struct Adam : RuleDefaults {
  static constexpr const char* kName = "adam";

  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay;
    double eps_hat;  // eps is added before the bias correction
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"betas", &Hyperparameters::beta1, 2},
      {"eps", &Hyperparameters::eps},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"amsgrad", &Hyperparameters::amsgrad},
      {"maximize", &Hyperparameters::maximize},
      {"decoupled_weight_decay", &Hyperparameters::decoupled_weight_decay},
      optional("eps_hat", &Hyperparameters::eps_hat)};

  static constexpr StateName kScalars[] = {{"step"}};
  static constexpr StateName kStates[] = {
      {"exp_avg", 0, Coding::kLinear}, {"exp_avg_sq", 0, Coding::kRoot}, {"max_exp_avg_sq"}};
  enum : unsigned { kMoments = 0b011, kMaxExpAvgSq = 0b100 };
  static constexpr unsigned kVariants[] = {kMoments, kMoments | kMaxExpAvgSq};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters& h) {
    return h.amsgrad != 0 ? kMoments | kMaxExpAvgSq : kMoments;
  }

  template <class T>
  struct Coefficients {
    T beta1, one_minus_beta1, beta2, one_minus_beta2;
    T step_size, inv_sqrt_bias_correction2, eps;
    T l2, decay;  // l2: weight decay added to the gradient; decay: factor of the parameter
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h,
                                                           const float* scalars) {
    const uint64_t step = static_cast<uint64_t>(scalars[0]);
    const double bias_correction1 = 1 - power(h.beta1, step);
    const double inv_sqrt_bias_correction2 = 1 / std::sqrt(1 - power(h.beta2, step));
    const bool decoupled = h.decoupled_weight_decay != 0;
    return {h.beta1,
            1 - h.beta1,
            h.beta2,
            1 - h.beta2,
            h.lr / bias_correction1,
            inv_sqrt_bias_correction2,
            h.eps_hat != 0 ? h.eps * inv_sqrt_bias_correction2 : h.eps,
            decoupled ? 0 : h.weight_decay,
            decoupled ? 1 - h.lr * h.weight_decay : 1};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned used, const Coefficients<T>& c, T grad, T param,
                                     T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq) {
    update_moments(c, with_l2(grad, c.l2, param), exp_avg, exp_avg_sq);
    T second_moment = exp_avg_sq;
    if ((used & kMaxExpAvgSq) != 0) {
      max_exp_avg_sq = max_exp_avg_sq > exp_avg_sq ? max_exp_avg_sq : exp_avg_sq;
      second_moment = max_exp_avg_sq;
    }
    const T denom = std::sqrt(second_moment) * c.inv_sqrt_bias_correction2 + c.eps;
    return exp_avg / denom;
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>& c, T param, T direction) {
    return param * c.decay - c.step_size * direction;
  }
};

}  // namespace fusedopt
