// What kernels' arguments carry to the device's memory ahead of a pass. See also passes.h.
#pragma once

#include "cuda/passes.h"

namespace fusedopt::cuda {

// What moves from step to step, to launch.moving.
cudaError_t upload_moving(const Pass& pass, const Launch& launch);

}  // namespace fusedopt::cuda
