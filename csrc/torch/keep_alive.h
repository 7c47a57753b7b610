// Memory that others may still read after we have let go of it: other threads, other streams, and
// captured graphs.
#pragma once

#include <c10/core/Storage.h>
#include <c10/util/FunctionRef.h>

#include <vector>

#include "torch/device_tensors.h"

namespace fusedopt {

// Owners of all memory of the caller's that a step reads and writes.
using KeepAlive = c10::function_ref<std::vector<c10::Storage>()>;

// Before kernels that use the tensors' memory are launched on the current stream, on CUDA.
void keep_for_current_stream(DeviceTensors& tensors, void* stream);

}  // namespace fusedopt
