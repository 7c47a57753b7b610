// Counters that all tensors share: see kernels.h.
#pragma once

#include "core/shared_count.h"
#include "cuda/passes.h"

namespace fusedopt::cuda {

cudaError_t spread_count(const int32_t* steps, const SharedScalars& scalars, int64_t num_tensors,
                         Launch launch);
cudaError_t collect_count(const StepControl& control, const SharedCount& count, Launch launch);

}  // namespace fusedopt::cuda
