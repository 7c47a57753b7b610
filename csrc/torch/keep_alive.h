// Keeps memory alive that other threads, other streams or captured graphs may still use.
#pragma once

#include <c10/core/Storage.h>
#include <c10/util/FunctionRef.h>

#include <vector>

#include "torch/device_tensors.h"

namespace fusedopt {

// Returns the storages of all memory of the caller that a step reads or writes.
using KeepAlive = c10::function_ref<std::vector<c10::Storage>()>;

// Whether the current stream is that of the first step, and no graph is captured.
bool is_alloc_stream_current(const DeviceTensors& tensors);

// Call it on CUDA, before launching kernels on the current stream.
void keep_for_current_stream(DeviceTensors& tensors, void* stream);

}  // namespace fusedopt
