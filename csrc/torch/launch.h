// Runs a rule's passes over the tensors of all devices: threads, streams, and what they exchange.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <cstddef>
#include <vector>

#include "kernels.h"
#include "torch/device_tensors.h"

namespace fusedopt {

// What keeps the memory that a run reads and writes.
using KeepAlive = c10::function_ref<std::vector<c10::Storage>()>;

// `passes`: one per partition. `owners` is called where other Python threads may run beside the
// passes.
void run(const RuleInfo& rule, std::vector<DeviceTensors>& devices,
         const std::vector<StepParams>& passes, Phases phases, KeepAlive keep_alive);

// The double at that offset in the partition's StepControl, shape (1,).
at::Tensor control_slot(const DeviceTensors& device_tensors, size_t offset);

// CUDA kernels are in this build. Whether there is a device to run them is torch's to say.
bool built_with_cuda();

// The device type that backend "cuda" runs on: "cpu" where CUDA is emulated, for tests.
c10::DeviceType cuda_device_type();

}  // namespace fusedopt
