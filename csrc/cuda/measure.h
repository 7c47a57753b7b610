// The norm pass. It is the same for all rules.
#pragma once

#include "cuda/passes.h"

namespace fusedopt::cuda {

// measure() and reduce() in one launch. If step.step_args is not null, it also copies the StepArgs
// there for the update pass.
cudaError_t measure_and_reduce(const StepParams& step, const Launch& launch);

}  // namespace fusedopt::cuda
