// Computes the coefficients that all elements of a tensor share in a step, from hyperparameters and
// counters.
#pragma once

#include <cstring>
#include <type_traits>

#include "core/dispatch.h"
#include "core/params.h"
#include "math/random.h"

namespace fusedopt {

template <class Rule>
inline constexpr int num_hyperparameters =
    std::is_empty_v<typename Rule::Hyperparameters>
        ? 0
        : sizeof(typename Rule::Hyperparameters) / sizeof(double);

template <class Rule>
FUSEDOPT_INLINE typename Rule::Hyperparameters hyperparameters(const double* values,
                                                               const Group& group) {
  typename Rule::Hyperparameters h;
  if constexpr (num_hyperparameters<Rule> > 0) memcpy(&h, values, sizeof(h));
  if constexpr (Rule::kHasLr) {
    if (group.lr != nullptr) {
      h.lr = group.lr_storage == Storage::kFloat64 ? *static_cast<const double*>(group.lr)
                                                   : *static_cast<const float*>(group.lr);
    }
  }
  return h;
}

// The hyperparameters of the group with this index.
template <class Rule>
FUSEDOPT_INLINE typename Rule::Hyperparameters hyperparameters(const StepParams& step,
                                                               int64_t group) {
  const double* const first = reinterpret_cast<const double*>(step.groups + step.num_groups);
  return hyperparameters<Rule>(first + group * num_hyperparameters<Rule>, step.groups[group]);
}

// The trust ratio of a tensor in the second pass of a rule that has one; else 1.
template <class Rule>
FUSEDOPT_INLINE double trust_ratio_of(const StepParams& step, int64_t tensor) {
  if constexpr (Rule::kHasTrustRatio && !Rule::kIsTrustPass) return step.trust_ratios[tensor];
  return 1;
}

// The coefficients and the gradient's factor, in float64.
template <class Rule>
struct Prepared {
  typename Rule::template Coefficients<double> coefficients;
  double grad_factor;
  uint64_t seed;  // with the step, for stochastic rounding
  uint64_t step;
};

// The addresses of a tensor's arrays and scalars, in this order: the parameter, the states, the
// scalars, the rest of a master.
template <class Rule>
class Pointers {
 public:
  static constexpr int kCount = 2 + num_states<Rule> + num_scalars<Rule>;

  FUSEDOPT_INLINE Pointers(const StepParams& step, int64_t tensor)
      : first_(step.pointers + tensor * kCount),
        scales_(step.scales == nullptr ? nullptr : step.scales + tensor * num_states<Rule>) {}

  FUSEDOPT_INLINE Array param(const TensorShape& shape) const {
    return {first_[0], first_[kCount - 1], shape.param, kParamShift};
  }
  FUSEDOPT_INLINE Array state(const TensorShape& shape, int k) const {  // null where not used
    float* const scales = scales_ == nullptr ? nullptr : scales_[k];
    return {first_[1 + k], scales, shape.states[k], kStateShift};
  }
  FUSEDOPT_INLINE float* scalar(int k) const {
    return static_cast<float*>(first_[1 + num_states<Rule> + k]);
  }
  FUSEDOPT_INLINE void load_scalars(float* scalars) const {
    for (int k = 0; k < num_scalars<Rule>; ++k) scalars[k] = *scalar(k);
  }

 private:
  void* const* first_;
  float* const* scales_;
};

template <class Rule>
FUSEDOPT_INLINE auto coefficients_of(const typename Rule::Hyperparameters& h, const float* scalars,
                                     [[maybe_unused]] double trust_ratio) {
  if constexpr (Rule::kHasTrustRatio) {
    return Rule::coefficients(h, scalars, trust_ratio);
  } else {
    return Rule::coefficients(h, scalars);
  }
}

// Changes `scalars` to the values that this step leaves.
template <class Rule>
FUSEDOPT_INLINE Prepared<Rule> prepare(const StepParams& step, int64_t group, float* scalars,
                                       double grad_factor, double trust_ratio) {
  const auto h = hyperparameters<Rule>(step, group);
  Rule::advance(h, scalars);
  if constexpr (Rule::kHasMaximize) {
    if (h.maximize != 0) grad_factor = -grad_factor;
  }
  const uint64_t steps = num_scalars<Rule> > 0 ? static_cast<uint64_t>(scalars[0]) : 0;
  const auto coefficients = coefficients_of<Rule>(h, scalars, trust_ratio);
  Rule::prepare_next(h, scalars);
  return {coefficients, grad_factor, step.groups[group].seed, steps};
}

// The random bits of a chunk's elements in this step.
template <class Rule>
FUSEDOPT_INLINE RandomBits random_bits(const Prepared<Rule>& prepared, const TensorShape& shape,
                                       Chunk chunk) {
  return {prepared.seed, prepared.step, shape.number, shape.first_element + chunk.begin()};
}

// Advances the scalars of a tensor. Call it after all of its elements are updated.
template <class Rule>
FUSEDOPT_INLINE void advance(const StepParams& step, int64_t tensor) {
  const Pointers<Rule> pointers(step, tensor);
  float scalars[kMaxScalars];
  pointers.load_scalars(scalars);
  const auto h = hyperparameters<Rule>(step, step.shapes[tensor].group);
  Rule::advance(h, scalars);
  Rule::prepare_next(h, scalars);
  for (int k = 0; k < num_scalars<Rule>; ++k) *pointers.scalar(k) = scalars[k];
}

// Rounds each coefficient once, from float64 to T. All members of Coefficients<T> have the type T.
template <class Rule, class T>
FUSEDOPT_INLINE typename Rule::template Coefficients<T> rounded(
    typename Rule::template Coefficients<double> coefficients) {
  typename Rule::template Coefficients<T> result;
  if constexpr (!std::is_empty_v<decltype(result)>) {
    constexpr int kCount = sizeof(coefficients) / sizeof(double);
    static_assert(sizeof(result) == kCount * sizeof(T), "a Coefficients<T> holds nothing but Ts");
    double from[kCount];
    T to[kCount];
    memcpy(from, &coefficients, sizeof(from));
    for (int k = 0; k < kCount; ++k) to[k] = static_cast<T>(from[k]);
    memcpy(&result, to, sizeof(to));
  }
  return result;
}

}  // namespace fusedopt
