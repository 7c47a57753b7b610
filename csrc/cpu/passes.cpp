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
void update_chunks(const StepParams& step, const Decision& decision, Walk& walk) {
  if (decision.skip) return;
  ChunkUpdater<Rule> updater(step, decision);
  walk.run([&](int64_t chunk) { updater.update_chunk(chunk); });
}

// The update and the end of a step, after the parts that decide. Every pass begins where the one
// before has ended: what was read last is still in the cache.
template <class Rule, class... Parts>
void update_after(const StepParams& step, const Team& team, Decision& decision,
                  const Parts&... parts) {
  Walk reverse(step, Order::kReverse, Arrays::kAll);
  if constexpr (Rule::kHasTrustRatio) {
    Walk forward(step, Order::kForward, Arrays::kAll);
    const Together terms{[&] { update_chunks<TrustPass<Rule>>(step, decision, reverse); }};
    const Alone ratios{[&] {
      if (!decision.skip) leave_trust_ratios<Rule>(step, OneWorker());
    }};
    const Together change{[&] { update_chunks<Rule>(step, decision, forward); }};
    in_turn(team, parts..., terms, ratios, change);
  } else {
    const Together change{[&] { update_chunks<Rule>(step, decision, reverse); }};
    in_turn(team, parts..., change);
  }
  const IeeeArithmetic ieee;
  finish<Rule>(step, decision, OneWorker());
}

}  // namespace

template <class Rule>
void update(const StepParams& step, const Team& team) {
  Decision decision = decision_of(step);
  update_after<Rule>(step, team, decision);
}

template <class Rule>
void run_step(const StepParams& step, const Team& team) {
  if (!step.options.measure) return update<Rule>(step, team);
  Walk walk(step, Order::kForward, Arrays::kGrads);
  Decision decision{};
  const Together norm{[&] { walk.run([&](int64_t chunk) { measure_chunk(step, chunk); }); }};
  const Alone decide_it{[&] {
    reduce(step);
    decision = decision_of(step);
  }};
  update_after<Rule>(step, team, decision, norm, decide_it);
}

template void update<FUSEDOPT_RULE>(const StepParams&, const Team&);
template void run_step<FUSEDOPT_RULE>(const StepParams&, const Team&);

}  // namespace fusedopt::cpu
