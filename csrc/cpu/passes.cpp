// This file is compiled once for each rule of rules/all.h, into an object of its own.
#include "cpu/passes.h"

#include "core/finish.h"
#include "core/trust.h"
#include "cpu/measure.h"
#include "cpu/update.h"
#include "cpu/walk.h"
#include "cpu/workers.h"
#include "rules/all.h"

namespace fusedopt::cpu {

namespace {

Decision decision_of(const StepParams& step) {
  return decide(step.options, step.options.measure ? step.control->sum_of_squares : 0.0);
}

template <class Rule>
void update_chunks(const StepParams& step, const Decision& decision, Walk& walk) {
  ChunkUpdater<Rule> updater(step, decision);
  walk.run([&](int64_t chunk) { updater.update_chunk(chunk); });
}

// The update, which begins in reverse: what the pass before has read last is still in the cache.
template <class Rule>
class Update {
 public:
  explicit Update(const StepParams& step)
      : step_(step),
        reverse_(step, Order::kReverse, Arrays::kAll),
        forward_(step, Order::kForward, Arrays::kAll) {}

  // Every thread of the team calls it.
  void run(const Decision& decision) {
    if (decision.skip) return;
    if constexpr (Rule::kHasTrustRatio) {
      update_chunks<TrustPass<Rule>>(step_, decision, reverse_);
#pragma omp barrier
#pragma omp single
      leave_trust_ratios<Rule>(step_, OneWorker());
      update_chunks<Rule>(step_, decision, forward_);
    } else {
      update_chunks<Rule>(step_, decision, reverse_);
    }
  }

 private:
  const StepParams& step_;
  Walk reverse_, forward_;
};

template <class Rule>
void end_step(const StepParams& step, Decision decision) {
  const IeeeArithmetic ieee;
  finish<Rule>(step, decision, OneWorker());
}

}  // namespace

template <class Rule>
void update(const StepParams& step, int threads) {
  const Decision decision = decision_of(step);
  Update<Rule> update(step);
  in_parallel(threads, [&] { update.run(decision); });
  end_step<Rule>(step, decision);
}

template <class Rule>
void run_step(const StepParams& step, int threads) {
  Walk norm_walk(step, Order::kForward, Arrays::kGrads);
  Update<Rule> update(step);
  Decision decision{};
  in_parallel(threads, [&] {
    if (step.options.measure) {
      norm_walk.run([&](int64_t chunk) { measure_chunk(step, chunk); });
#pragma omp barrier
    }
#pragma omp single
    {
      if (step.options.measure) reduce(step);
      decision = decision_of(step);
    }
    update.run(decision);
  });
  end_step<Rule>(step, decision);
}

template void update<FUSEDOPT_RULE>(const StepParams&, int);
template void run_step<FUSEDOPT_RULE>(const StepParams&, int);

}  // namespace fusedopt::cpu
