// The three calls of a step on the CPU. All is done on return.
#pragma once

#include "core/params.h"

namespace fusedopt::cpu {

void measure(const StepParams& step, int threads);
void reduce(const StepParams& step);
template <class Rule>
void update(const StepParams& step, int threads);

// All of them, in one parallel region.
template <class Rule>
void run_step(const StepParams& step, int threads);

}  // namespace fusedopt::cpu
