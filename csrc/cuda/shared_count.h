// Counters that all tensors share: see kernels.h.
#pragma once

#include "cuda/passes.h"
#include "kernels.h"

namespace fusedopt::cuda {

cudaError_t spread_count(const int32_t* steps, const SharedScalars& scalars, int64_t num_tensors,
                         Launch launch);
cudaError_t collect_count(const StepControl& control, const SharedCount& count, Launch launch);

}  // namespace fusedopt::cuda
