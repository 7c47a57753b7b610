// The end of a step: counters, readings, limits, telemetry. It runs after all elements are updated,
// or after the step is skipped.
//
// Both backends end a step here. The workers are one CPU thread, or the threads of one CUDA block.
// `workers` offers
//
// - once(body): calls body() in one worker; all others wait.
// - each(count, body): calls body(i) for every i, each in one worker.
// - each_tensor(step, gather, body): calls body(t, gather(t, sum)) for every tensor t. One worker
//   calls body(), one or several call gather().
//   sum.of<Norm>(value) combines value(c) of the tensor's chunks c in kTensorLanes lanes.
//   sum.exact(value) adds them exactly, and rounds once.
// - total(step): the sum of squares of all chunks that count; every worker gets it.
// - smallest(count, start, value): the smallest of start and every value(i); every worker gets it.
// - ranked(norms, size, rank): the sorted norms at rank and rank + 1; every worker gets them.
// - load(pointer): loads a value that another worker has written.
// - has_advanced(shape): whether the update of the tensor's only chunk has advanced its counters.
#pragma once

#include "core/coefficients.h"
#include "core/segments.h"

namespace fusedopt {

// Writes the row of the step.
template <class Rule>
FUSEDOPT_INLINE void record_step(const StepParams& step, const Decision& decision) {
  if (step.telemetry.steps == nullptr) return;
  const int64_t row = static_cast<int64_t>(step.control->steps) % step.telemetry.rows;
  double* const columns = step.telemetry.steps + row * (kStepColumns + step.num_groups);
  columns[0] = decision.grad_norm;
  columns[1] = decision.clip_coef;
  columns[2] = decision.skip ? 1 : 0;
  if constexpr (Rule::kHasLr) {
    for (int64_t g = 0; g < step.num_groups; ++g) {
      columns[kStepColumns + g] = hyperparameters<Rule>(step, g).lr;
    }
  }
}

// A parameter's sums over its chunks.
struct ParamSums {
  double grad_squares;
  ChunkMeasures measures;
};

// Writes the rows of the parameters.
template <class Workers>
FUSEDOPT_INLINE void record_params(const StepParams& step, const Decision& decision,
                                   const Workers& workers) {
  const int64_t row = static_cast<int64_t>(step.control->steps) % step.telemetry.rows;
  ParamRow* const rows = step.telemetry.params + row * step.num_tensors;
  const auto gather = [&](int64_t t, const auto& sum) {
    ParamSums totals{};
    if (step.grads[t] == nullptr) return totals;
    const auto field = [&](double ChunkMeasures::* it) {
      return
          [&step, it](int64_t chunk) { return Workers::load(&(step.chunk_measures[chunk].*it)); };
    };
    ChunkMeasures& measures = totals.measures;
    measures.grad_max = sum.template of<MaxAbs>(field(&ChunkMeasures::grad_max));
    measures.infs = sum.template of<SumOfSquares>(field(&ChunkMeasures::infs));
    measures.nans = sum.template of<SumOfSquares>(field(&ChunkMeasures::nans));
    if (!decision.skip) {  // a skipped step has measured neither updates nor parameters
      measures.update_squares =
          sum.template of<SumOfSquares>(field(&ChunkMeasures::update_squares));
      measures.param_squares = sum.template of<SumOfSquares>(field(&ChunkMeasures::param_squares));
    }
    totals.grad_squares =
        sum.exact([&](int64_t chunk) { return Workers::load(step.chunk_sums + chunk); });
    return totals;
  };
  workers.each_tensor(step, gather, [&](int64_t t, const ParamSums& totals) {
    const bool has_grad = step.grads[t] != nullptr;
    rows[t] = has_grad ? param_row(totals.grad_squares, totals.measures, decision) : absent_row();
  });
}

// Adds each tensor's norm, as it is after clipping, to the tensor's average.
template <class Workers>
FUSEDOPT_INLINE void update_per_tensor(const StepParams& step, const Decision& decision,
                                       const Workers& workers) {
  const PerTensor per_tensor(step.options.limit);
  const auto counts = [&](int64_t t) {
    return step.grads[t] != nullptr && !is_unclipped(step, static_cast<uint32_t>(t));
  };
  const auto gather = [&](int64_t t, const auto& sum) {
    const auto squares = [&](int64_t chunk) { return Workers::load(step.chunk_sums + chunk); };
    return counts(t) ? sum.exact(squares) : 0.0;
  };
  workers.each_tensor(step, gather, [&](int64_t t, double squares) {
    if (!counts(t)) return;
    const TensorShape& shape = step.shapes[t];
    // No other worker reads the average that changes here.
    const double coef = segment_coef(step, decision, shape, {squares, 0});
    per_tensor.observe(shape.number, std::sqrt(squares) * decision.inv_scale * coef);
  });
}

// Adds the norms of this step to the statistics of an adaptive limit.
template <class Workers>
FUSEDOPT_INLINE void update_limit(const StepParams& step, const Decision& decision,
                                  const Workers& workers) {
  const Limit& limit = step.options.limit;
  switch (limit.kind) {
    case LimitKind::kZScore:
      workers.once([&] { ZScore(limit).observe(decision.grad_norm); });
      break;
    case LimitKind::kPercentile: {
      const Percentile percentile(limit);
      workers.once([&] { percentile.observe(decision.grad_norm); });
      const auto [lower, upper] =
          workers.ranked(percentile.norms(), percentile.size(), percentile.rank());
      workers.once([&, lower = lower, upper = upper] { percentile.set_limit(lower, upper); });
      break;
    }
    case LimitKind::kPerTensor:
      update_per_tensor(step, decision, workers);
      break;
    case LimitKind::kFixed:
    case LimitKind::kUnit:
      break;  // they have no statistics
  }
}

// `decision` lies in memory that all workers share.
template <class Rule, class Workers>
FUSEDOPT_INLINE void finish(const StepParams& step, Decision& decision, const Workers& workers) {
  if (!decision.skip) {
    workers.each(step.num_tensors, [&](int64_t t) {
      if (step.grads[t] != nullptr && !workers.has_advanced(step.shapes[t])) {
        advance<Rule>(step, t);
      }
    });
  }
  if (!step.options.measure) {  // the update pass has summed up each chunk's squares
    const double sum = workers.total(step);
    workers.once([&] {
      step.control->sum_of_squares = sum;
      decision = decide(step.options, sum);
    });
  }
  if (step.updates_limit && is_to_be_observed(step.options, decision)) {
    update_limit(step, decision, workers);
  }
  if (step.chunk_coefs != nullptr && !decision.skip) {
    const double smallest_coef =
        workers.smallest(step.num_chunks, decision.clip_coef, [&](int64_t chunk) {
          const bool has_grad = step.grads[step.chunks[chunk].tensor] != nullptr;
          return has_grad ? Workers::load(step.chunk_coefs + chunk) : decision.clip_coef;
        });
    workers.once([&] { decision.clip_coef = smallest_coef; });
  }
  if (step.telemetry.params != nullptr) record_params(step, decision, workers);
  workers.once([&] {
    if (step.telemetry.params != nullptr) record_step<Rule>(step, decision);
    record(*step.control, decision, step.control->sum_of_squares);
  });
}

}  // namespace fusedopt
