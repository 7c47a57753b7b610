// Clipping by itself, for any optimizer: the "parameter" is the gradient, multiplied in place.
#pragma once

#include <array>

#include "math/inline.h"
#include "rules/rule.h"

namespace fusedopt {

struct ClipGrads {
  static constexpr const char* kName = "clip_grads";

  struct Hyperparameters {};
  static constexpr std::array<HyperparameterName, 0> kHyperparameters{};
  static constexpr std::array<const char*, 0> kScalars{};
  static constexpr std::array<const char*, 0> kStates{};
  static constexpr unsigned kVariants[] = {0};

  static FUSEDOPT_INLINE unsigned states_used(const Hyperparameters&) { return 0; }

  static FUSEDOPT_INLINE void advance(const Hyperparameters&, float*) {}

  template <class T>
  struct Coefficients {};

  static FUSEDOPT_INLINE Coefficients<double> coefficients(const Hyperparameters&, const float*) {
    return {};
  }

  // `grad` has been multiplied by the clip coefficient.
  template <class T>
  static FUSEDOPT_INLINE void update(unsigned, const Coefficients<T>&, T grad, T& param) {
    param = grad;
  }
};

}  // namespace fusedopt
