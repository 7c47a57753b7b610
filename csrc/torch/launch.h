// Launches a step: chooses threads and streams, and exchanges norms between several devices.
#pragma once

#include <vector>

#include "torch/exchange.h"
#include "torch/keep_alive.h"

namespace fusedopt {

// `steps` has one entry per device. `keep_alive` is called before other Python threads may run.
// `exchange` is empty, or it is called between measure and update. Then the steps must measure.
void launch_step(const RuleInfo& rule, std::vector<DeviceTensors>& devices,
                 const std::vector<StepParams>& steps, KeepAlive keep_alive,
                 const Exchange& exchange);

// Launches the update alone. The norm must be in the controls already.
void launch_update(const RuleInfo& rule, std::vector<DeviceTensors>& devices,
                   const std::vector<StepParams>& steps, KeepAlive keep_alive);

// Whether the host knows that the step has changed nothing. It never knows this of a GPU, as it
// doesn't wait for the GPU's decision.
bool is_known_skip(const std::vector<DeviceTensors>& devices);

}  // namespace fusedopt
