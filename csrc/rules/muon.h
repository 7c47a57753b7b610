// The first half of Muon's step (Jordan et al., 2024): momentum, and the direction before it is
// orthogonalized. Python orthogonalizes it, and SGD's kernels apply it to the parameter.
#pragma once

#include "math/inline.h"
#include "rules/rule.h"

namespace fusedopt {

struct Muon : RuleDefaults {
  static constexpr const char* kName = "muon";
  static constexpr bool kHasMaximize = false;

  // Python's half takes the others: what can't be taken is refused before anything is written.
  struct Hyperparameters {
    double lr, momentum, nesterov, weight_decay, eps, a, b, c;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},
      {"momentum", &Hyperparameters::momentum},
      {"nesterov", &Hyperparameters::nesterov},
      {"weight_decay", &Hyperparameters::weight_decay},
      {"eps", &Hyperparameters::eps},
      {"ns_coefficients", &Hyperparameters::a, 3, nullptr, /*any_sign=*/true}};

  static constexpr StateName kScalars[] = {{"momentum_steps"}};  // torch keeps no such state
  static constexpr StateName kStates[] = {{"momentum_buffer"}, {"direction"}};
  enum : unsigned { kBoth = 0b11 };
  static constexpr unsigned kVariants[] = {kBoth};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return kBoth; }

  // The second half counts the step.
  static FUSEDOPT_INLINE void advance(const Hyperparameters&, float*) {}

  template <class T>
  struct Coefficients {
    T momentum, one_minus_momentum, nesterov;
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h, const float*) {
    return {h.momentum, 1 - h.momentum, h.nesterov};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>& c, T grad, T,
                                     T& momentum_buffer, T& direction) {
    const T share = c.one_minus_momentum * grad;
    momentum_buffer = c.momentum * momentum_buffer + share;
    direction = c.nesterov != 0 ? c.momentum * momentum_buffer + share : momentum_buffer;
    return direction;
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>&, T param, T) {
    return param;
  }
};

}  // namespace fusedopt
