// From run-time values to compile-time types: dtypes, norms, and which states a rule uses.
#pragma once

#include <cstring>
#include <iterator>
#include <type_traits>

#include "core/params.h"
#include "math/convert.h"
#include "math/norm.h"

namespace fusedopt {

template <class Param, class Grad, class State>
struct Types {
  using param_t = Param;
  using grad_t = Grad;
  using state_t = State;
  using compute_t = opmath_t<Param>;
};

template <class half_t, class Body>
FUSEDOPT_INLINE void visit_16_bits(bool wide_grad, bool wide_state, Body&& body) {
  if (wide_grad) {
    wide_state ? body(Types<half_t, float, float>{}) : body(Types<half_t, float, half_t>{});
  } else {
    wide_state ? body(Types<half_t, half_t, float>{}) : body(Types<half_t, half_t, half_t>{});
  }
}

// Calls body(Types<...>{}) for a tensor's dtypes. A gradient has its parameter's dtype or, of
// 16-bit parameters, float32; so have the states.
template <class Body>
FUSEDOPT_INLINE void visit_types(const TensorEntry& tensor, Body&& body) {
  const bool wide_grad = tensor.grad_dtype != tensor.param_dtype;
  const bool wide_state = tensor.state_dtype != tensor.param_dtype;
  switch (tensor.param_dtype) {
    case Dtype::kFloat32:
      return body(Types<float, float, float>{});
    case Dtype::kFloat64:
      return body(Types<double, double, double>{});
    case Dtype::kBFloat16:
      return visit_16_bits<bfloat16>(wide_grad, wide_state, body);
    case Dtype::kFloat16:
      return visit_16_bits<float16>(wide_grad, wide_state, body);
  }
}

// Calls body(SumOfSquares{}) or body(MaxAbs{}), and returns what it returns.
template <class Body>
FUSEDOPT_INLINE auto visit_norm(NormType type, Body&& body) {
  return type == NormType::kL2 ? body(SumOfSquares{}) : body(MaxAbs{});
}

// Calls body(std::integral_constant<unsigned, used>{}) for the variant of the rule that uses these.
template <class Rule, int k = 0, class Body>
FUSEDOPT_INLINE void visit_variant(unsigned states_used, Body&& body) {
  if constexpr (k < static_cast<int>(sizeof(Rule::kVariants) / sizeof(unsigned))) {
    constexpr unsigned kVariant = Rule::kVariants[k];
    if (states_used == kVariant) return body(std::integral_constant<unsigned, kVariant>{});
    visit_variant<Rule, k + 1>(states_used, body);
  }
}

// The states that every variant of the rule uses.
template <class Rule>
constexpr unsigned always_used() {
  unsigned used = ~0u;
  for (const unsigned variant : Rule::kVariants) used &= variant;
  return used;
}

template <class Rule>
inline constexpr int num_states = std::size(Rule::kStates);
template <class Rule>
inline constexpr int num_scalars = std::size(Rule::kScalars);

// The length of an array with an element per state: there are no arrays without elements.
template <class Rule>
inline constexpr int state_slots = num_states<Rule> > 0 ? num_states<Rule> : 1;

template <class Rule>
FUSEDOPT_INLINE typename Rule::Hyperparameters hyperparameters(const Group& group) {
  typename Rule::Hyperparameters h;
  if constexpr (!std::is_empty_v<decltype(h)>) {
    constexpr int kCount = sizeof(h) / sizeof(double);
    static_assert(kCount <= kMaxHyperparameters, "raise kMaxHyperparameters");
    double values[kCount];  // nvcc would copy the group itself byte by byte
    for (int k = 0; k < kCount; ++k) values[k] = group.values[k];
    memcpy(&h, values, sizeof(h));
    if (group.lr != nullptr) {
      h.lr = group.lr_dtype == Dtype::kFloat64 ? *static_cast<const double*>(group.lr)
                                               : *static_cast<const float*>(group.lr);
    }
  }
  return h;
}

// What all elements of one tensor share in one step, in float64.
template <class Rule>
struct Prepared {
  typename Rule::template Coefficients<double> coefficients;
  double grad_factor;
};

template <class Rule>
FUSEDOPT_INLINE void load_scalars(const TensorEntry& tensor, float* scalars) {
  for (int k = 0; k < num_scalars<Rule>; ++k) scalars[k] = *tensor.scalars[k];
}

template <class Rule>
FUSEDOPT_INLINE Prepared<Rule> prepare(const Group& group, float* scalars, double grad_factor) {
  const auto h = hyperparameters<Rule>(group);
  Rule::advance(h, scalars);
  if constexpr (!std::is_empty_v<decltype(h)>) {
    if (h.maximize != 0) grad_factor = -grad_factor;
  }
  return {Rule::coefficients(h, scalars), grad_factor};
}

// The counters of a tensor, once all of its elements are updated.
template <class Rule>
FUSEDOPT_INLINE void advance(const TensorEntry& tensor, const Group& group) {
  float scalars[kMaxScalars];
  load_scalars<Rule>(tensor, scalars);
  Rule::advance(hyperparameters<Rule>(group), scalars);
  for (int k = 0; k < num_scalars<Rule>; ++k) *tensor.scalars[k] = scalars[k];
}

// A step's own row of telemetry.
template <class Rule>
FUSEDOPT_INLINE void record_step(const StepParams& step, const Decision& decision) {
  if (step.telemetry.steps == nullptr) return;
  const int64_t row = static_cast<int64_t>(step.control->steps) % step.telemetry.rows;
  double* const columns = step.telemetry.steps + row * (kStepColumns + step.num_groups);
  columns[0] = decision.grad_norm;
  columns[1] = decision.clip_coef;
  columns[2] = decision.skip ? 1 : 0;
  if constexpr (!std::is_empty_v<typename Rule::Hyperparameters>) {
    for (int64_t g = 0; g < step.num_groups; ++g) {
      columns[kStepColumns + g] = hyperparameters<Rule>(step.groups[g]).lr;
    }
  }
}

// The parameters' rows of this step, one per tensor.
FUSEDOPT_INLINE ParamRow* param_rows(const StepParams& step) {
  const int64_t row = static_cast<int64_t>(step.control->steps) % step.telemetry.rows;
  return step.telemetry.params + row * step.num_tensors;
}

// Each coefficient rounded once from float64: T is the only type of a Coefficients' members.
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
