// Resilient backpropagation (Riedmiller and Braun, 1993).
#pragma once

#include "math/inline.h"
#include "rules/rule.h"

namespace fusedopt {

struct Rprop : RuleDefaults {
  static constexpr const char* kName = "rprop";

  struct Hyperparameters {
    double lr, eta_minus, eta_plus, smallest, largest, maximize;
  };
  static constexpr Option<Hyperparameters> kHyperparameters[] = {
      {"lr", &Hyperparameters::lr},  // the first step sizes: see the rule's Python class
      {"etas", &Hyperparameters::eta_minus, 2, nullptr, /*any_sign=*/true},
      {"step_sizes", &Hyperparameters::smallest, 2, nullptr, /*any_sign=*/true},
      {"maximize", &Hyperparameters::maximize}};

  static constexpr StateName kScalars[] = {{"step"}};
  static constexpr StateName kStates[] = {{"prev"}, {"step_size"}};
  enum : unsigned { kAll = 0b11 };
  static constexpr unsigned kVariants[] = {kAll};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return kAll; }

  template <class T>
  struct Coefficients {
    T eta_minus, eta_plus, smallest, largest;
  };

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters& h, const float*) {
    return {h.eta_minus, h.eta_plus, h.smallest, h.largest};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>& c, T grad, T, T& prev,
                                     T& step_size) {
    const T product = grad * prev;
    const T grown = step_size * (product > 0 ? c.eta_plus : product < 0 ? c.eta_minus : T(1));
    const T raised = grown < c.smallest ? c.smallest : grown;
    step_size = raised > c.largest ? c.largest : raised;
    prev = product < 0 ? T(0) : grad;  // a gradient that has changed its sign waits for one step
    return sign_of(prev) * step_size;
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>&, T param, T direction) {
    return param - direction;
  }
};

}  // namespace fusedopt
