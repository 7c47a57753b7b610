// What kernels' arguments carry to the device's memory ahead of a pass. See also passes.h.
#pragma once

#include "cuda/passes.h"

namespace fusedopt::cuda {

// What moves from step to step, to launch.moving.
cudaError_t upload_step_args(const StepParams& step, const Launch& launch);

}  // namespace fusedopt::cuda
