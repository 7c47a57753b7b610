// The norm pass, which no rule has a part in.
#pragma once

#include "cuda/passes.h"

namespace fusedopt::cuda {

// measure() and reduce() in one launch. It leaves in step.step_args, if they are there, what the
// update pass needs.
cudaError_t measure_and_reduce(const StepParams& step, const Launch& launch);

}  // namespace fusedopt::cuda
