// Who may still read memory of ours after we have let go of it: other streams, and captured graphs.
#pragma once

#if FUSEDOPT_WITH_CUDA

#include <cuda_runtime.h>

#include "torch/device_tensors.h"

namespace fusedopt {

// Before kernels that use the partition's memory are launched on the current stream.
void keep_for_current_stream(DeviceTensors& device_tensors, cudaStream_t stream);

}  // namespace fusedopt

#endif
