// The norm pass, which no rule has a part in.
#pragma once

#include "cuda/passes.h"

namespace fusedopt::cuda {

// Leaves in launch.moving, if there is any, what the update pass needs.
cudaError_t measure(const StepParams& step, const Launch& launch);

}  // namespace fusedopt::cuda
