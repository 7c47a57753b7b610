// This file is compiled once for each rule of rules/all.h, into an object of its own.
#include "cpu/passes.h"

#include "core/finish.h"
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

// Every thread of the team calls it.
template <class Rule>
void update_chunks(const StepParams& step, const Decision& decision, Walk& walk) {
  if (decision.skip) return;
  ChunkUpdater<Rule> updater(step, decision);
  walk.run([&](int64_t chunk) { updater.update_chunk(chunk); });
}

template <class Rule>
void end_step(const StepParams& step, Decision decision) {
  const IeeeArithmetic ieee;
  finish<Rule>(step, decision, OneWorker());
}

}  // namespace

template <class Rule>
void update(const StepParams& step, int threads) {
  const Decision decision = decision_of(step);
  Walk walk(step, Order::kReverse);
  in_parallel(threads, [&] { update_chunks<Rule>(step, decision, walk); });
  end_step<Rule>(step, decision);
}

template <class Rule>
void run_step(const StepParams& step, int threads) {
  // The update goes in reverse: the gradients that the norm pass has read last are still in the
  // cache.
  Walk norm_walk(step, Order::kForward), update_walk(step, Order::kReverse);
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
    update_chunks<Rule>(step, decision, update_walk);
  });
  end_step<Rule>(step, decision);
}

template void update<FUSEDOPT_RULE>(const StepParams&, int);
template void run_step<FUSEDOPT_RULE>(const StepParams&, int);

}  // namespace fusedopt::cpu
