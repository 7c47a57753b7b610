// The two passes on the CPU: the norm of the gradients, and the update.
#pragma once

#include "core/params.h"
#include "cpu/schedule.h"

namespace fusedopt::cpu {

// All is done on return.
template <class Rule>
void run(const StepParams& step, const Schedule& schedule, Phases phases);

}  // namespace fusedopt::cpu
