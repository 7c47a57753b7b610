// Copies StepArgs to the device's memory before a pass. See also cuda/passes.h.
#pragma once

#include "cuda/passes.h"

namespace fusedopt::cuda {

// Copies the StepArgs to step.step_args.
cudaError_t upload_step_args(const StepParams& step, const Launch& launch);

}  // namespace fusedopt::cuda
