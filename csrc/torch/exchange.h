// The exchange between the devices of one optimizer, and between ranks, in a step.
#pragma once

#include <functional>
#include <vector>

#include "torch/device_tensors.h"

namespace fusedopt {

struct Exchange {
  // Takes this rank's messages (core/message.h), one tensor per device: int64, shape
  // (kMessageSize,). Returns the total of all ranks. It may throw: then nothing is updated.
  std::function<at::Tensor(const std::vector<at::Tensor>&)> add_up;
  std::vector<at::Tensor> counted;  // by device, which chunks this rank counts: bool

  explicit operator bool() const { return static_cast<bool>(add_up); }
};

// Gives every device the sum of squares over all ranks, and whether they skip, in its `found_inf`.
void exchange_with_ranks(std::vector<DeviceTensors>& devices, const std::vector<StepParams>& steps,
                         const Exchange& exchange);

// Combines the sums (or largest magnitudes) of the chunks of all devices on the first device, and
// gives every device the result. `step` is the first device's.
void exchange_norms(std::vector<DeviceTensors>& devices, StepParams step);

// Writes the smallest clip coefficient of all devices to the first device's control and telemetry.
void exchange_coefs(std::vector<DeviceTensors>& devices);

// Gives every device the first device's number of steps. It selects the rows of telemetry.
void exchange_step_number(std::vector<DeviceTensors>& devices);

}  // namespace fusedopt
