// The update of neighboring elements: the loop around a rule.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "core/dispatch.h"
#include "cpu/grad_norm.h"
#include "cpu/measure.h"

namespace fusedopt::cpu {

// What else a loop over elements sums up on its way.
enum class FusedReduction { kNothing, kGradNorm, kTelemetry };

template <class Rule, unsigned kUsed, class types, FusedReduction kBeside>
struct Update {
  using T = typename types::compute_t;
  using param_t = typename types::param_t;
  using grad_t = typename types::grad_t;
  using Common = Prepared<Rule>;
  static constexpr int64_t kRow = kNormLanes<param_t>;
  using TelemetryLanes = UpdateLanes<T, kRow>;
  // kNothing: none; kGradNorm: the chunk's sum of squares; kTelemetry: lanes for the caller to
  // fold.
  using Sums = std::conditional_t<kBeside == FusedReduction::kTelemetry, TelemetryLanes, double>;

  // Elements [begin, begin + count) of the tensor, of which the first begins a row, by as many
  // gradients.
  static FUSEDOPT_INLINE void run(const TensorEntry* tensor, const grad_t* grads, int64_t begin,
                                  int64_t count, const Common* prepared, Sums* sums) {
    constexpr auto kAllStates = std::make_index_sequence<num_states<Rule>>{};
    if constexpr (kBeside == FusedReduction::kNothing) {
      update(*tensor, grads, begin, count, *prepared, nullptr, nullptr, kAllStates);
      return;
    }
    Lanes<SumOfSquares, kRow> norm;
    for (int64_t first = 0; first < count; first += kRow) {
      const int64_t row = std::min(count - first, kRow);
      double* norm_lanes = nullptr;
      TelemetryLanes* lanes = nullptr;
      if constexpr (kBeside == FusedReduction::kGradNorm) norm_lanes = norm.of_row(first, row);
      if constexpr (kBeside == FusedReduction::kTelemetry) lanes = sums;
      update(*tensor, grads + first, begin + first, row, *prepared, norm_lanes, lanes, kAllStates);
    }
    if constexpr (kBeside == FusedReduction::kGradNorm) *sums = norm.fold();
  }

  template <size_t... k>
  static FUSEDOPT_INLINE void update(const TensorEntry& tensor, const grad_t* grads, int64_t begin,
                                     int64_t count, const Common& prepared,
                                     double* __restrict norm_lanes, TelemetryLanes* lanes,
                                     std::index_sequence<k...>) {
    const auto c = rounded<Rule, T>(prepared.coefficients);
    const auto grad_factor = static_cast<T>(prepared.grad_factor);
    auto* const params = static_cast<param_t*>(tensor.param) + begin;
    [[maybe_unused]]
    typename types::state_t* const states[state_slots<Rule>] = {first<k>(tensor, begin)...};
    // `__restrict`, as no pragma tells gcc that lanes are apart from what the other pointers reach.
    constexpr bool kMeasures = kBeside == FusedReduction::kTelemetry;
    [[maybe_unused]] T* const __restrict param_lanes = kMeasures ? lanes->params : nullptr;
    [[maybe_unused]] T* const __restrict update_lanes = kMeasures ? lanes->updates : nullptr;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      T param = widen(params[i]);
      [[maybe_unused]] const T before = param;
      T state[state_slots<Rule>] = {load<k>(states[k], i)...};
      const T grad = widen(grads[i]);
      if constexpr (kBeside == FusedReduction::kGradNorm) {
        norm_lanes[i] = SumOfSquares::combine(norm_lanes[i], SumOfSquares::term(grad));
      }
      Rule::update(kUsed, c, grad * grad_factor, param, state[k]...);
      params[i] = narrow<param_t>(param);
      (store<k>(states[k], i, state[k]), ...);
      if constexpr (kMeasures) {
        const T update = round_to<param_t>(param) - before;
        param_lanes[i] += before * before;
        update_lanes[i] += update * update;
      }
    }
  }

  template <size_t k>
  static constexpr bool used() {
    return (kUsed >> k & 1) != 0;
  }

  template <size_t k>
  static FUSEDOPT_INLINE typename types::state_t* first(const TensorEntry& tensor, int64_t begin) {
    if constexpr (!used<k>()) return nullptr;
    return static_cast<typename types::state_t*>(tensor.state[k]) + begin;
  }

  template <size_t k>
  static FUSEDOPT_INLINE T load(const typename types::state_t* states, int64_t i) {
    if constexpr (!used<k>()) return 0;
    return widen(states[i]);
  }

  template <size_t k>
  static FUSEDOPT_INLINE void store(typename types::state_t* states, int64_t i, T value) {
    if constexpr (used<k>()) states[i] = narrow<typename types::state_t>(value);
  }
};

}  // namespace fusedopt::cpu
