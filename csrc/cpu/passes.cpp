// This file is compiled once for each rule of rules/all.h, into an object of its own.
#include "cpu/passes.h"

#include "core/finish.h"
#include "core/trust.h"
#include "cpu/measure.h"
#include "cpu/team.h"
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
void update_chunks(const StepParams& step, const Decision& decision, Order order,
                   const Team& team) {
  Walk walk(step, order, Arrays::kAll);
  in_parallel(team, [&] {
    ChunkUpdater<Rule> updater(step, decision);
    walk.run([&](int64_t chunk) { updater.update_chunk(chunk); });
  });
}

// Every pass begins where the one before has ended: what was read last is still in the cache.
template <class Rule>
void update_all(const StepParams& step, const Decision& decision, const Team& team) {
  if constexpr (Rule::kHasTrustRatio) {
    update_chunks<TrustPass<Rule>>(step, decision, Order::kReverse, team);
    leave_trust_ratios<Rule>(step, OneWorker());
    update_chunks<Rule>(step, decision, Order::kForward, team);
  } else {
    update_chunks<Rule>(step, decision, Order::kReverse, team);
  }
}

}  // namespace

template <class Rule>
void update(const StepParams& step, const Team& team) {
  const IeeeArithmetic ieee;
  Decision decision = decision_of(step);
  if (!decision.skip) update_all<Rule>(step, decision, team);
  finish<Rule>(step, decision, OneWorker());
}

template <class Rule>
void run_step(const StepParams& step, const Team& team) {
  if (step.options.measure) {
    measure(step, team);
    reduce(step);
  }
  update<Rule>(step, team);
}

template void update<FUSEDOPT_RULE>(const StepParams&, const Team&);
template void run_step<FUSEDOPT_RULE>(const StepParams&, const Team&);

}  // namespace fusedopt::cpu
