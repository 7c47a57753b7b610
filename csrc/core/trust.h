// Trust ratios: a rule that declares one takes two passes over the chunks. The first pass updates
// some states, and measures the norms of every parameter and of a term of the rule's. The second
// pass gets the tensor's ratio, which the rule computes from the two norms.
#pragma once

#include <cmath>
#include <cstddef>

#include "core/coefficients.h"

namespace fusedopt {

// The first pass of a rule with a trust ratio, in the form of a rule: the loops over elements are
// those of an update. The "new parameter" is the term; it is measured, and not stored.
template <class Rule>
struct TrustPass : Rule {
  static constexpr bool kIsTrustPass = true;

  template <class T, class... State>
  static FUSEDOPT_INLINE T direction(unsigned used,
                                     const typename Rule::template Coefficients<T>& c, T grad,
                                     T param, State&... states) {
    return Rule::trust_term(used, c, grad, param, states...);
  }
  template <class T>
  static FUSEDOPT_INLINE T apply(const typename Rule::template Coefficients<T>&, T, T term) {
    return term;
  }
};

// What a pass loads and stores. Bit k stands for the rule's kStates[k].
template <class Rule>
inline constexpr unsigned loaded_states =
    Rule::kIsTrustPass ? Rule::kTrustStates | Rule::kTrustReads : ~0u;
template <class Rule>
inline constexpr unsigned stored_states =
    Rule::kIsTrustPass ? Rule::kTrustStates : ~Rule::kTrustStates;

template <class Rule>
FUSEDOPT_INLINE constexpr bool is_stored(size_t state) {
  return (stored_states<Rule> >> state & 1) != 0;
}

template <class Rule>
inline constexpr bool reads_params = !Rule::kIsTrustPass || Rule::kTrustReadsParams;

// If the first pass updates states, they hold all that the second pass needs of the gradient.
template <class Rule>
inline constexpr bool reads_grads = Rule::kIsTrustPass || Rule::kTrustStates == 0;

// Whether a pass measures the gradients, if no norm pass has done so: the first pass does.
template <class Rule>
FUSEDOPT_INLINE bool measures_grads(const StepParams& step) {
  return (Rule::kIsTrustPass || !Rule::kHasTrustRatio) && !step.options.measure;
}

// Computes the ratios of all tensors that have gradients, from the sums of their chunks. `workers`:
// see core/finish.h.
template <class Rule, class Workers>
FUSEDOPT_INLINE void leave_trust_ratios(const StepParams& step, const Workers& workers) {
  const auto gather = [&](int64_t t, const auto& sum) {
    TrustSums squares{};
    if (step.grads[t] == nullptr) return squares;
    const auto total = [&](double TrustSums::* it) {
      return sum.exact([&](int64_t chunk) { return Workers::load(&(step.trust_sums[chunk].*it)); });
    };
    if (Rule::kTrustReadsParams) squares.params = total(&TrustSums::params);
    squares.terms = total(&TrustSums::terms);
    return squares;
  };
  workers.each_tensor(step, gather, [&](int64_t t, const TrustSums& squares) {
    if (step.grads[t] == nullptr) return;
    const auto h = hyperparameters<Rule>(step, step.shapes[t].group);
    const double numel = static_cast<double>(step.shapes[t].numel);
    step.trust_ratios[t] =
        Rule::trust_ratio(h, {std::sqrt(squares.params), std::sqrt(squares.terms), numel});
  });
}

}  // namespace fusedopt
