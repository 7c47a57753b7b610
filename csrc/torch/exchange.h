// What the devices of one optimizer tell each other in a step.
#pragma once

#include <vector>

#include "torch/device_tensors.h"

namespace fusedopt {

// The sum of squares of each device (or its largest magnitude) becomes that of all, combined in the
// order of the devices.
void exchange_norms(std::vector<DeviceTensors>& devices, NormType norm_type);

// The smallest clip coefficient of each device becomes the first device's reading, and goes to its
// telemetry.
void exchange_coefs(std::vector<DeviceTensors>& devices);

// The number of steps so far, by which rows of telemetry are found, becomes the first device's.
void exchange_step_number(std::vector<DeviceTensors>& devices);

}  // namespace fusedopt
