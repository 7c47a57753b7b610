// The update of a chunk on the CPU. For each row, it loads every array as T, applies the rule, and
// stores the arrays.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "core/coefficients.h"
#include "core/trust.h"
#include "cpu/grad_norm.h"
#include "cpu/measure.h"
#include "cpu/rows.h"
#include "cpu/segment_coefs.h"
#include "cpu/telemetry.h"
#include "rules/rule.h"

namespace fusedopt::cpu {

// The only loop over elements that calls a rule. Bit k of kRoots: states[k] holds roots.
template <class Rule, unsigned kUsed, class T, unsigned kRoots = 0>
struct RuleLoop {
  using Coefficients = typename Rule::template Coefficients<T>;

  static FUSEDOPT_INLINE void run(const Coefficients* coefficients, T grad_factor, int64_t count,
                                  T* params, const T* grads, T* const* states) {
    run(*coefficients, grad_factor, count, params, grads, states,
        std::make_index_sequence<num_states<Rule>>{});
  }

  template <size_t... k>
  static FUSEDOPT_INLINE void run(const Coefficients coefficients, const T grad_factor,
                                  int64_t count, T* params, const T* grads,
                                  [[maybe_unused]] T* const* all_states,
                                  std::index_sequence<k...>) {
    [[maybe_unused]] T* const states[state_slots<Rule>] = {all_states[k]...};
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      T param = params[i];
      T state[state_slots<Rule>] = {load<k>(states[k], i)...};
      const T grad = reads_grads<Rule> ? grads[i] * grad_factor : T{0};
      update_element<Rule>(kUsed, coefficients, grad, param, state[k]...);
      params[i] = param;
      (store<k>(states[k], i, state[k]), ...);
    }
  }

  static constexpr bool used(size_t k) { return (kUsed >> k & 1) != 0; }
  static constexpr bool is_root(size_t k) { return (kRoots >> k & 1) != 0; }

  template <size_t k>
  static FUSEDOPT_INLINE T load(const T* states, int64_t i) {
    if constexpr (!used(k)) return 0;
    if constexpr (is_root(k)) return states[i] * states[i];
    return states[i];
  }

  template <size_t k>
  static FUSEDOPT_INLINE void store(T* states, int64_t i, T value) {
    if constexpr (used(k) && is_stored<Rule>(k)) {
      states[i] = is_root(k) ? std::sqrt(value) : value;
    }
  }
};

// A thread's data for parameters that are computed in T: rows of the arrays, and the last tensor's
// coefficients. They are kept between chunks, as most tensors share the same coefficients.
template <class Rule, class T>
struct Work {
  Rows<T> params, grads, states[state_slots<Rule>];
  Prepared<Rule> prepared;
  typename Rule::template Coefficients<T> coefficients;
  T grad_factor;
  bool has_roots;  // the states that can be stored as roots are
  alignas(64) T terms[Rule::kIsTrustPass ? kRow<T> : 1];

  void prepare_for(const StepParams& step, uint32_t tensor, double factor) {
    const uint32_t group = step.shapes[tensor].group;
    float scalars[kMaxScalars] = {};
    Pointers<Rule>(step, tensor).load_scalars(scalars);
    const bool same_scalars = memcmp(scalars, scalars_, sizeof(scalars)) == 0;
    const double trust_ratio = trust_ratio_of<Rule>(step, tensor);
    const bool same_ratio = !Rule::kHasTrustRatio || trust_ratio == trust_ratio_;
    if (group == group_ && same_scalars && factor == factor_ && same_ratio) return;
    group_ = group;
    memcpy(scalars_, scalars, sizeof(scalars));
    factor_ = factor;
    trust_ratio_ = trust_ratio;
    prepared = prepare<Rule>(step, group, scalars, factor, trust_ratio);
    coefficients = rounded<Rule, T>(prepared.coefficients);
    grad_factor = static_cast<T>(prepared.grad_factor);
  }

  template <unsigned kUsed>
  bool all_in_place() const {
    bool result = params.in_place() && grads.in_place();
    for_each_state<kUsed>([&](int k) { result = result && states[k].in_place(); });
    return result;
  }

  template <unsigned kUsed, class Body>
  static FUSEDOPT_INLINE void for_each_state(Body body) {
#pragma GCC unroll 8
    for (int k = 0; k < num_states<Rule>; ++k) {
      if ((kUsed >> k & 1) != 0) body(k);
    }
  }

  // Loads a row of every array, calls observe(params), applies the rule, and stores the row.
  template <unsigned kUsed, class Observe>
  FUSEDOPT_INLINE void update_row(Isa isa, int64_t first, int64_t count, Observe observe) {
    T* const param_row = params.load(isa, first, count);
    observe(param_row);
    update_states<kUsed>(isa, first, count, param_row);
    params.store(isa, first, count);
  }

  // The same for the first pass of a rule with a trust ratio. Calls observe(params, terms) at the
  // end, and stores no parameters. `params` is null if the pass doesn't read them.
  template <unsigned kUsed, class Observe>
  FUSEDOPT_INLINE void measure_terms(Isa isa, int64_t first, int64_t count, Observe observe) {
    const T* const param_row = reads_params<Rule> ? params.load(isa, first, count) : nullptr;
    if constexpr (reads_params<Rule>) memcpy(terms, param_row, count * sizeof(T));
    update_states<kUsed>(isa, first, count, terms);
    observe(param_row, terms);
  }

 private:
  // Applies the rule to a row of parameters, and to the states.
  template <unsigned kUsed>
  FUSEDOPT_INLINE void update_states(Isa isa, int64_t first, int64_t count, T* param_row) {
    const T* const grad_row = reads_grads<Rule> ? grads.load(isa, first, count) : nullptr;
    T* state_rows[state_slots<Rule>] = {};
    for_each_state<kUsed>([&](int k) { state_rows[k] = states[k].load(isa, first, count); });
    apply_rule<kUsed>(isa, count, param_row, grad_row, state_rows);
    for_each_state<kUsed>([&](int k) {
      if (is_stored<Rule>(k)) states[k].store(isa, first, count);
    });
  }

  template <unsigned kUsed>
  FUSEDOPT_INLINE void apply_rule(Isa isa, int64_t count, T* param_row, const T* grad_row,
                                  T* const* state_rows) {
    constexpr unsigned kRoots = sizeof(T) == sizeof(float) ? roots_of<Rule>(kUsed) : 0;
    if constexpr (kRoots != 0) {
      if (has_roots) {
        return run_best<RuleLoop<Rule, kUsed, T, kRoots>>(isa, &coefficients, grad_factor, count,
                                                          param_row, grad_row, state_rows);
      }
    }
    run_best<RuleLoop<Rule, kUsed, T>>(isa, &coefficients, grad_factor, count, param_row, grad_row,
                                       state_rows);
  }

  uint32_t group_ = UINT32_MAX;
  float scalars_[kMaxScalars];
  double factor_ = 0, trust_ratio_ = 1;
};

// Updates chunks. Every thread has its own object.
template <class Rule>
class ChunkUpdater {
 public:
  ChunkUpdater(const StepParams& step, const Decision& decision)
      : step_(step), isa_(best_isa()), coefs_(step, isa_, decision) {}

  // Updates the chunk with this index, and measures it if the step asks for that.
  void update_chunk(int64_t index) {
    const Chunk chunk = step_.chunks[index];
    if (step_.shapes[chunk.tensor].param == Storage::kFloat64) {
      update_as(doubles_, chunk, index);
    } else {
      update_as(floats_, chunk, index);
    }
  }

 private:
  template <class T>
  void update_as(Work<Rule, T>& work, Chunk chunk, int64_t index) {
    const TensorShape& shape = step_.shapes[chunk.tensor];
    const Pointers<Rule> pointers(step_, chunk.tensor);
    begin_grads(work, chunk, index);
    const RandomBits random =
        is_stochastic(shape) ? random_bits<Rule>(work.prepared, shape, chunk) : RandomBits();
    work.has_roots = fusedopt::has_roots(shape);
    work.params.begin(pointers.param(shape), chunk.begin(), random);
    visit_variant<Rule>(step_.groups[shape.group].states_used, [&](auto used) {
      constexpr unsigned kLoaded = used() & loaded_states<Rule>;
      work.template for_each_state<kLoaded>(
          [&](int k) { work.states[k].begin(pointers.state(shape, k), chunk.begin(), random); });
      update_and_measure<kLoaded>(work, shape, index, chunk.size(shape.numel));
    });
  }

  template <class T>
  void begin_grads(Work<Rule, T>& work, Chunk chunk, int64_t index) {
    if constexpr (!reads_grads<Rule>) return work.prepare_for(step_, chunk.tensor, 1.0);
    const TensorShape& shape = step_.shapes[chunk.tensor];
    const auto factor = coefs_.shared_factor(index);
    if (factor.has_value()) {
      work.prepare_for(step_, chunk.tensor, *factor);
      work.grads.begin(grads_of(step_.grads[chunk.tensor], shape.grad), chunk.begin());
    } else {
      work.prepare_for(step_, chunk.tensor, 1.0);
      work.grads.begin(grads_of(coefs_.scaled_grads(index), computed_in(shape.param)), 0);
    }
  }

  // A chunk that no pass has measured before is measured last: its gradients are still in a cache.
  template <unsigned kUsed, class T>
  void update_and_measure(Work<Rule, T>& work, const TensorShape& shape, int64_t index,
                          int64_t size) {
    if constexpr (Rule::kIsTrustPass) {
      measure_terms<kUsed>(work, shape, index, size);
    } else if (step_.chunk_measures != nullptr) {
      update_with_telemetry<kUsed>(work, shape, index, size);
    } else {
      update_rows<kUsed>(work, size);
    }
    if (measures_grads<Rule>(step_)) measure_chunk(step_, index);
  }

  template <unsigned kUsed, class T>
  void update_rows(Work<Rule, T>& work, int64_t size) {
    const int64_t row = work.template all_in_place<kUsed>() ? size : kRow<T>;
    for (int64_t first = 0; first < size; first += row) {
      const int64_t count = std::min(row, size - first);
      work.template update_row<kUsed>(isa_, first, count, [](const T*) {});
    }
  }

  template <unsigned kUsed, class T>
  void update_with_telemetry(Work<Rule, T>& work, const TensorShape& shape, int64_t index,
                             int64_t size) {
    SquareLanes<T, Changes<T>> lanes(shape, size);
    alignas(64) T before[kRow<T>];
    for (int64_t first = 0; first < size; first += kRow<T>) {
      const int64_t count = std::min(kRow<T>, size - first);
      work.template update_row<kUsed>(
          isa_, first, count, [&](const T* params) { memcpy(before, params, count * sizeof(T)); });
      // The parameters are loaded again, to see how they were rounded.
      lanes.add(isa_, first, count, before, work.params.load(isa_, first, count));
    }
    ChunkMeasures& measures = step_.chunk_measures[index];
    lanes.leave_totals(isa_, &measures.param_squares, &measures.update_squares);
  }

  template <unsigned kUsed, class T>
  void measure_terms(Work<Rule, T>& work, const TensorShape& shape, int64_t index, int64_t size) {
    SquareLanes<T, Terms<T, reads_params<Rule>>> lanes(shape, size);
    for (int64_t first = 0; first < size; first += kRow<T>) {
      const int64_t count = std::min(kRow<T>, size - first);
      work.template measure_terms<kUsed>(isa_, first, count, [&](const T* params, const T* terms) {
        lanes.add(isa_, first, count, params, terms);
      });
    }
    TrustSums& sums = step_.trust_sums[index];
    lanes.leave_totals(isa_, &sums.params, &sums.terms);
  }

  const StepParams& step_;
  const Isa isa_;
  SegmentCoefs coefs_;
  Work<Rule, float> floats_;
  Work<Rule, double> doubles_;
};

}  // namespace fusedopt::cpu
