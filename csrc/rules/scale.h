// Scaling alone, for clip_grad_norm_. The "parameter" is the gradient, and it is multiplied in
// place.
#pragma once

#include <array>

#include "math/inline.h"
#include "rules/rule.h"

namespace fusedopt {

struct Scale : RuleDefaults {
  static constexpr const char* kName = "scale";
  static constexpr bool kHasLr = false;
  static constexpr bool kHasMaximize = false;

  struct Hyperparameters {};
  static constexpr std::array<Option<Hyperparameters>, 0> kHyperparameters{};
  static constexpr std::array<StateName, 0> kScalars{};
  static constexpr std::array<StateName, 0> kStates{};
  static constexpr unsigned kVariants[] = {0};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return 0; }

  static FUSEDOPT_INLINE void advance(const Hyperparameters&, float*) {}

  template <class T>
  struct Coefficients {};

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters&, const float*) {
    return {};
  }

  template <class T>
  static FUSEDOPT_INLINE T direction(unsigned, const Coefficients<T>&, T grad, T) {
    return grad;
  }

  template <class T>
  static FUSEDOPT_INLINE T apply(const Coefficients<T>&, T, T direction) {
    return direction;
  }
};

}  // namespace fusedopt
