// The update of a chunk on the CPU: row by row, each array is loaded as T, the rule is applied, and
// each array is stored.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/coefficients.h"
#include "cpu/grad_norm.h"
#include "cpu/measure.h"
#include "cpu/rows.h"
#include "cpu/segments.h"
#include "cpu/telemetry.h"
#include "rules/rule.h"

namespace fusedopt::cpu {

// The only loop over elements that a rule is in.
template <class Rule, unsigned kUsed, class T>
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
      update_element<Rule>(kUsed, coefficients, grads[i] * grad_factor, param, state[k]...);
      params[i] = param;
      (store<k>(states[k], i, state[k]), ...);
    }
  }

  static constexpr bool used(size_t k) { return (kUsed >> k & 1) != 0; }

  template <size_t k>
  static FUSEDOPT_INLINE T load(const T* states, int64_t i) {
    if constexpr (!used(k)) return 0;
    return states[i];
  }

  template <size_t k>
  static FUSEDOPT_INLINE void store(T* states, int64_t i, T value) {
    if constexpr (used(k)) states[i] = value;
  }
};

template <class T>
using NormLanes = Lanes<SumOfSquares, kRow<T>>;

template <class T>
struct AddToNorm {
  static FUSEDOPT_INLINE void run(NormLanes<T>* lanes, const T* grads, int64_t first,
                                  int64_t count) {
    lanes->add_row(Term<SumOfSquares, T>{grads - first}, first, count);
  }
};

// What a thread keeps between chunks: the last tensor's coefficients, as most tensors share them,
// and rows of the arrays.
template <class Rule>
class ChunkUpdater {
 public:
  ChunkUpdater(const StepParams& step, const Decision& decision)
      : step_(step), isa_(best_isa()), coefs_(step, isa_, decision) {}

  // The chunk of that index, and what the step measures of it.
  void update_chunk(int64_t index) {
    const Chunk chunk = step_.chunks[index];
    if (step_.shapes[chunk.tensor].param == Storage::kFloat64) {
      update_as(double_rows_, chunk, index);
    } else {
      update_as(float_rows_, chunk, index);
    }
  }

 private:
  template <class T>
  struct Arrays {
    Rows<T> params, grads, states[state_slots<Rule>];
  };

  template <unsigned kUsed, class Body>
  static FUSEDOPT_INLINE void for_each_state(Body body) {
#pragma GCC unroll 8
    for (int k = 0; k < num_states<Rule>; ++k) {
      if ((kUsed >> k & 1) != 0) body(k);
    }
  }

  template <class T>
  void update_as(Arrays<T>& arrays, Chunk chunk, int64_t index) {
    const TensorShape& shape = step_.shapes[chunk.tensor];
    const Pointers<Rule> pointers(step_, chunk.tensor);
    const unsigned used = step_.groups[shape.group].states_used;
    arrays.params.begin(pointers.param(), shape.param, chunk.begin());
    if (const auto factor = coefs_.shared_factor(index); factor.has_value()) {
      prepare_for(shape, pointers, *factor);
      arrays.grads.begin(step_.grads[chunk.tensor], shape.grad, chunk.begin());
    } else {
      prepare_for(shape, pointers, 1.0);
      arrays.grads.begin(coefs_.scaled_grads(index), computed_in(shape.param), 0);
    }
    visit_variant<Rule>(used, [&](auto variant) {
      for_each_state<variant()>([&](int k) {
        arrays.states[k].begin(pointers.state(k), shape.states[k], chunk.begin());
      });
      measure_and_update<variant()>(arrays, shape, index, chunk.size(shape.numel));
    });
  }

  // The norm's arithmetic hides behind the memory traffic of the update. 16-bit types have none to
  // spare: their chunks are measured first, and then are still in a cache.
  template <unsigned kUsed, class T>
  void measure_and_update(Arrays<T>& arrays, const TensorShape& shape, int64_t index,
                          int64_t size) {
    const bool telemetry = step_.chunk_measures != nullptr;
    if (telemetry) {
      if (!step_.options.measure) measure_chunk(step_, index);
      UpdateLanes<T> lanes(shape, size);
      update_rows<kUsed>(arrays, size, nullptr, &lanes);
      return lanes.leave_totals(isa_, step_.chunk_measures[index]);
    }
    if (step_.options.measure) return update_rows<kUsed, T>(arrays, size, nullptr, nullptr);
    if (bytes_of(shape.param) < bytes_of(Storage::kFloat32)) {
      measure_chunk(step_, index);
      return update_rows<kUsed, T>(arrays, size, nullptr, nullptr);
    }
    NormLanes<T> norm;
    update_rows<kUsed, T>(arrays, size, &norm, nullptr);
    step_.chunk_sums[index] = norm.fold();
  }

  template <unsigned kUsed, class T>
  void update_rows(Arrays<T>& arrays, int64_t size, NormLanes<T>* norm, UpdateLanes<T>* lanes) {
    const auto coefficients = rounded<Rule, T>(prepared_.coefficients);
    const T grad_factor = static_cast<T>(prepared_.grad_factor);
    const bool at_once = norm == nullptr && lanes == nullptr && all_in_place<kUsed>(arrays);
    const int64_t row = at_once ? size : kRow<T>;
    alignas(64) T before[kRow<T>];
    for (int64_t first = 0; first < size; first += row) {
      const int64_t count = std::min(row, size - first);
      T* const params = arrays.params.load(isa_, first, count);
      const T* const grads = arrays.grads.load(isa_, first, count);
      T* states[state_slots<Rule>] = {};
      for_each_state<kUsed>([&](int k) { states[k] = arrays.states[k].load(isa_, first, count); });
      if (norm != nullptr) run_best<AddToNorm<T>>(isa_, norm, grads, first, count);
      if (lanes != nullptr) memcpy(before, params, count * sizeof(T));
      run_best<RuleLoop<Rule, kUsed, T>>(isa_, &coefficients, grad_factor, count, params, grads,
                                         states);
      arrays.params.store(isa_, first, count);
      for_each_state<kUsed>([&](int k) { arrays.states[k].store(isa_, first, count); });
      if (lanes != nullptr) {  // loaded again: as it was rounded
        lanes->add(isa_, first, count, before, arrays.params.load(isa_, first, count));
      }
    }
  }

  template <unsigned kUsed, class T>
  static bool all_in_place(const Arrays<T>& arrays) {
    bool result = arrays.params.in_place() && arrays.grads.in_place();
    for_each_state<kUsed>([&](int k) { result = result && arrays.states[k].in_place(); });
    return result;
  }

  void prepare_for(const TensorShape& shape, const Pointers<Rule>& pointers, double grad_factor) {
    float scalars[kMaxScalars] = {};
    pointers.load_scalars(scalars);
    const bool same_scalars = memcmp(scalars, scalars_, sizeof(scalars)) == 0;
    if (shape.group == group_ && same_scalars && grad_factor == grad_factor_) return;
    group_ = shape.group;
    memcpy(scalars_, scalars, sizeof(scalars));
    grad_factor_ = grad_factor;
    prepared_ = prepare<Rule>(step_, group_, scalars, grad_factor);
  }

  const StepParams& step_;
  const Isa isa_;
  SegmentCoefs coefs_;
  uint32_t group_ = UINT32_MAX;
  float scalars_[kMaxScalars];
  double grad_factor_ = 0;
  Prepared<Rule> prepared_;
  Arrays<float> float_rows_;
  Arrays<double> double_rows_;
};

}  // namespace fusedopt::cpu
