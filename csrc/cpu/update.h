// One chunk's update: the loop around a rule.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../dispatch.h"
#include "grad_norm.h"

namespace fusedopt::cpu {

template <class Rule, unsigned kUsed, class types>
struct Update {
  using T = typename types::compute_t;
  using grad_t = typename types::grad_t;
  using Coefficients = typename Rule::template Coefficients<T>;

  // Where `sum` is not null, it gets the sum of the gradients' squares, from the same read of them.
  static FUSEDOPT_INLINE void run(const TensorEntry* tensor, const void* grad, Chunk chunk,
                                  const Prepared<Rule>* prepared, double* sum) {
    const int64_t size = chunk.size(tensor->numel);
    const auto* grads = static_cast<const grad_t*>(grad) + chunk.begin();
    const auto c = rounded<Rule, T>(prepared->coefficients);
    const auto grad_factor = static_cast<T>(prepared->grad_factor);
    constexpr auto kAllStates = std::make_index_sequence<num_states<Rule>>{};
    if (sum == nullptr) {
      return update(*tensor, grads, chunk.begin(), size, c, grad_factor, kAllStates);
    }
    constexpr int64_t kLanes = kNormLanes<typename types::param_t>;
    Lanes<SumOfSquares, kLanes> lanes;
    for (int64_t first = 0; first < size; first += kLanes) {
      const int64_t count = std::min(size - first, kLanes);
      lanes.add_row(Term<SumOfSquares, grad_t>{grads}, first, count);
      update(*tensor, grads + first, chunk.begin() + first, count, c, grad_factor, kAllStates);
    }
    *sum = lanes.fold();
  }

  template <size_t... k>
  static FUSEDOPT_INLINE void update(const TensorEntry& tensor, const grad_t* grads, int64_t begin,
                                     int64_t count, const Coefficients c, const T grad_factor,
                                     std::index_sequence<k...>) {
    auto* const params = static_cast<typename types::param_t*>(tensor.param) + begin;
    [[maybe_unused]]
    typename types::state_t* const states[state_slots<Rule>] = {first<k>(tensor, begin)...};
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      T param = widen(params[i]);
      T state[state_slots<Rule>] = {load<k>(states[k], i)...};
      Rule::update(kUsed, c, widen(grads[i]) * grad_factor, param, state[k]...);
      params[i] = narrow<typename types::param_t>(param);
      (store<k>(states[k], i, state[k]), ...);
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
