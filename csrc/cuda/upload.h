// What kernels' arguments carry to the device's memory ahead of a pass. See also cuda/passes.h.
#pragma once

#include "cuda/passes.h"

namespace fusedopt::cuda {

// The step's arguments, to step.step_args.
cudaError_t upload_step_args(const StepParams& step, const Launch& launch);

}  // namespace fusedopt::cuda
