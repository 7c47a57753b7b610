// Compiled once per rule of ../rules.h: each is an object of its own.
#include "cpu/passes.h"

#include <algorithm>
#include <atomic>
#include <cfenv>

#include "cpu/isa.h"
#include "cpu/measure.h"
#include "cpu/segments.h"
#include "cpu/update.h"
#include "rules/all.h"

namespace fusedopt::cpu {

namespace {

// Whether the norm's arithmetic hides behind the update's memory traffic. 16-bit types have none to
// spare: their chunks are measured first, and then are still in a cache.
template <class Types>
inline constexpr bool sums_on_its_way = sizeof(typename Types::param_t) >= sizeof(float);

// What a thread keeps between chunks: the last tensor's coefficients, as most tensors share them.
template <class Rule>
class Updater {
 public:
  Updater(const StepParams& step, Isa isa, const Decision& decision)
      : step_(step), isa_(isa), decision_(decision), units_(step, isa, decision) {}

  // The chunk of that index, and what the step measures of it.
  void update(int64_t index) {
    const Chunk chunk = step_.chunks[index];
    TensorEntry tensor = step_.tensors[chunk.tensor];
    if (step_.own_clips.coefs == nullptr) {
      prepare_for(tensor, factor_of_tensor(step_, decision_, chunk.tensor));
      return update(tensor, index, step_.grads[chunk.tensor], chunk.begin());
    }
    prepare_for(tensor, 1.0);
    const void* const scaled = units_.scale(index);
    tensor.grad_dtype = UnitScaler::dtype_of(tensor);
    update(tensor, index, scaled, 0);
  }

 private:
  // By gradients of which the chunk's first is at `first`.
  void update(const TensorEntry& tensor, int64_t index, const void* grad, int64_t first) {
    visit_types(tensor, [&](auto types) {
      const auto* grads = static_cast<const typename decltype(types)::grad_t*>(grad) + first;
      visit_variant<Rule>(step_.groups[tensor.group].states_used, [&](auto used) {
        update<used(), decltype(types)>(tensor, index, grads);
      });
    });
  }

  template <unsigned kUsed, class Types>
  void update(const TensorEntry& tensor, int64_t index, const typename Types::grad_t* grads) {
    const bool telemetry = step_.telemetry.chunks != nullptr;
    if constexpr (sums_on_its_way<Types>) {
      if (!telemetry && !step_.options.measure) {
        using Kernel = Update<Rule, kUsed, Types, FusedReduction::kGradNorm>;
        return update<Kernel>(tensor, index, grads, &step_.chunk_sums[index]);
      }
    }
    if (!step_.options.measure) measure_grads(step_, isa_, index);
    if (!telemetry) {
      return update<Update<Rule, kUsed, Types, FusedReduction::kNothing>>(tensor, index, grads,
                                                                          nullptr);
    }
    using Kernel = Update<Rule, kUsed, Types, FusedReduction::kTelemetry>;
    typename Kernel::TelemetryLanes lanes(step_.chunks[index].size(tensor.numel));
    update<Kernel>(tensor, index, grads, &lanes);
    ChunkMeasures& measures = step_.telemetry.chunks[index];
    measures.param_squares = total_of_lanes(isa_, lanes.params, lanes.width);
    measures.update_squares = total_of_lanes(isa_, lanes.updates, lanes.width);
  }

  template <class Kernel>
  void update(const TensorEntry& tensor, int64_t index, const typename Kernel::grad_t* grads,
              typename Kernel::Sums* sums) {
    const Chunk chunk = step_.chunks[index];
    run_best<Kernel>(isa_, &tensor, grads, chunk.begin(), chunk.size(tensor.numel), &prepared_,
                     sums);
  }

  void prepare_for(const TensorEntry& tensor, double grad_factor) {
    float scalars[kMaxScalars] = {};
    load_scalars<Rule>(tensor, scalars);
    const bool same_scalars = memcmp(scalars, scalars_, sizeof(scalars)) == 0;
    if (tensor.group == group_ && same_scalars && grad_factor == grad_factor_) return;
    group_ = tensor.group;
    memcpy(scalars_, scalars, sizeof(scalars));
    grad_factor_ = grad_factor;
    prepared_ = prepare<Rule>(step_.groups[group_], scalars, grad_factor);
  }

  const StepParams& step_;
  const Isa isa_;
  const Decision decision_;
  UnitScaler units_;
  uint32_t group_ = UINT32_MAX;
  float scalars_[kMaxScalars];
  double grad_factor_ = 0;
  Prepared<Rule> prepared_;
};

// Small tensors are over before the processor has begun to fetch ahead by itself.
void prefetch(const void* data) {
  constexpr int kLine = 64, kLines = 4;
  for (int line = 0; line < kLines; ++line) {
    __builtin_prefetch(static_cast<const char*>(data) + line * kLine);
  }
}

void prefetch(const StepParams& step, int64_t chunk, bool updates) {
  if (chunk >= step.num_chunks || step.chunks[chunk].index != 0) return;
  const TensorEntry& tensor = step.tensors[step.chunks[chunk].tensor];
  prefetch(step.grads[step.chunks[chunk].tensor]);
  if (!updates) return;
  prefetch(tensor.param);
  for (const void* state : tensor.state) prefetch(state);
  __builtin_prefetch(tensor.scalars[0]);
}

// IEEE arithmetic for as long as it lives, on its thread: torch.set_flush_denormal, or a library
// that was built with -ffast-math, may have switched subnormal numbers off on some threads.
class IeeeArithmetic {
 public:
  IeeeArithmetic() {
    fegetenv(&before_);
    fesetenv(FE_DFL_ENV);
  }
  ~IeeeArithmetic() { fesetenv(&before_); }
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;

 private:
  fenv_t before_;
};

// Calls body(chunk index) for every chunk that has a gradient, each in one of the threads. Spans
// are taken in turn, from the last one if reversed; within a span chunks follow each other in
// memory.
template <class Body>
void walk(const StepParams& step, const Schedule& schedule, std::atomic<int64_t>& next,
          bool reverse, Body body) {
  constexpr int64_t kAhead = 3;
  const int64_t num_spans = static_cast<int64_t>(schedule.spans.size());
  for (int64_t taken = next++; taken < num_spans; taken = next++) {
    const Span span = schedule.spans[reverse ? num_spans - 1 - taken : taken];
    for (int64_t i = span.first; i < span.last; ++i) {
      prefetch(step, i + kAhead, reverse);
      if (step.grads[step.chunks[i].tensor] != nullptr) {
        body(i);
      } else {
        step.chunk_sums[i] = 0;
      }
    }
  }
}

// Once all elements are updated, or none.
template <class Rule>
void finish(const StepParams& step, Decision decision) {
  for (int64_t i = 0; i < step.num_tensors && !decision.skip; ++i) {
    const TensorEntry& tensor = step.tensors[i];
    if (step.grads[i] != nullptr) advance<Rule>(tensor, step.groups[tensor.group]);
  }
  if (!step.options.measure) {
    step.control->sum_of_squares = total_of_chunks(step);
    decision = decide(step.options, step.control->sum_of_squares);
  }
  const double smallest = decision.skip ? decision.clip_coef : smallest_coef(step, decision);
  if (step.updates_limit && is_to_be_observed(step.options, decision)) observe(step, decision);
  decision.clip_coef = smallest;
  if (step.telemetry.chunks != nullptr) {
    record_step<Rule>(step, decision);
    ParamRow* const rows = param_rows(step);
    for (int64_t i = 0; i < step.num_tensors; ++i) rows[i] = param_row(step, i, decision);
  }
  record(*step.control, decision, step.control->sum_of_squares);
}

}  // namespace

template <class Rule>
void run(const StepParams& step, const Schedule& schedule, Phases phases) {
  const Isa isa = best_isa();
  const bool measures = phases != Phases::kUpdate && step.options.measure;
  const bool updates = phases != Phases::kMeasure;
  std::atomic<int64_t> next_to_measure{0}, next_to_update{0};
  Decision decision{};

#pragma omp parallel num_threads(schedule.threads)
  {
    const IeeeArithmetic ieee;
    if (measures) {
      walk(step, schedule, next_to_measure, false, [&](int64_t i) { measure_grads(step, isa, i); });
#pragma omp barrier
    }
#pragma omp single
    {
      if (measures) step.control->sum_of_squares = total_of_chunks(step);
      if (measures && step.own_clips.tensor_norms != nullptr) measure_tensors(step);
      decision = decide(step.options, step.options.measure ? step.control->sum_of_squares : 0.0);
    }
    if (updates && !decision.skip) {
      Updater<Rule> updater(step, isa, decision);
      // In reverse: what the norm pass read last is still in the cache.
      walk(step, schedule, next_to_update, true, [&](int64_t i) { updater.update(i); });
    }
  }
  const IeeeArithmetic ieee;
  if (updates) finish<Rule>(step, decision);
}

template void run<FUSEDOPT_RULE>(const StepParams&, const Schedule&, Phases);

}  // namespace fusedopt::cpu
