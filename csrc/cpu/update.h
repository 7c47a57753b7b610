// One chunk's update: the loop around a rule.
#pragma once

#include <cstdint>
#include <utility>

#include "../dispatch.h"

namespace fusedopt::cpu {

template <class Rule, unsigned kUsed, class types>
struct Update {
  using T = typename types::compute_t;
  using Coefficients = typename Rule::template Coefficients<T>;

  static FUSEDOPT_INLINE void run(const TensorEntry* tensor, const void* grad, Chunk chunk,
                                  const Prepared<Rule>* prepared) {
    walk(*tensor, static_cast<const typename types::grad_t*>(grad), chunk,
         rounded<Rule, T>(prepared->coefficients), static_cast<T>(prepared->grad_factor),
         std::make_index_sequence<num_states<Rule>>{});
  }

  template <size_t... k>
  static FUSEDOPT_INLINE void walk(const TensorEntry& tensor, const typename types::grad_t* grads,
                                   Chunk chunk, const Coefficients c, const T grad_factor,
                                   std::index_sequence<k...>) {
    const int64_t begin = chunk.begin();
    const int64_t size = chunk.size(tensor.numel);
    auto* const params = static_cast<typename types::param_t*>(tensor.param) + begin;
    typename types::state_t* const states[] = {first<k>(tensor, begin)...};
    grads += begin;
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) {
      T param = widen(params[i]);
      T state[] = {load<k>(states[k], i)...};
      Rule::template update<kUsed>(c, widen(grads[i]) * grad_factor, param, state[k]...);
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
