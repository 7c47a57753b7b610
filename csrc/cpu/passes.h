// The three calls of a step on the CPU. Each has done its work when it returns.
#pragma once

#include "core/params.h"
#include "core/team.h"

namespace fusedopt::cpu {

void measure(const StepParams& step, const Team& team);
void reduce(const StepParams& step);
void write_message(const StepParams& step, const bool* counted, int64_t* message);
template <class Rule>
void update(const StepParams& step, const Team& team);

// All three calls in one parallel region. The first two run only if step.options.measure is set.
template <class Rule>
void run_step(const StepParams& step, const Team& team);

}  // namespace fusedopt::cpu
