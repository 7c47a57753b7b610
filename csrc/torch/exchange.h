// The exchange between the devices of one optimizer, and between ranks, in a step.
#pragma once

#include <functional>
#include <vector>

#include "torch/device_tensors.h"

namespace fusedopt {

// Takes the sums of the chunks, one tensor per device. Returns the sum of squares over all ranks.
// It may throw: then nothing is updated.
using Exchange = std::function<double(const std::vector<at::Tensor>&)>;

// Gives every device the sum of squares over all ranks.
void exchange_with_ranks(std::vector<DeviceTensors>& devices, const Exchange& exchange);

// Combines the sums (or largest magnitudes) of the chunks of all devices on the first device, and
// gives every device the result. `step` is the first device's.
void exchange_norms(std::vector<DeviceTensors>& devices, StepParams step);

// Writes the smallest clip coefficient of all devices to the first device's control and telemetry.
void exchange_coefs(std::vector<DeviceTensors>& devices);

// Gives every device the first device's number of steps. It selects the rows of telemetry.
void exchange_step_number(std::vector<DeviceTensors>& devices);

}  // namespace fusedopt
