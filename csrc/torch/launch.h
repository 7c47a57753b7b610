// Hands a step to the kernels: threads, streams, and the exchange between several devices.
#pragma once

#include <vector>

#include "torch/keep_alive.h"

namespace fusedopt {

// `steps`: one per device. `keep_alive` is called where other Python threads may run meanwhile.
void launch_step(const RuleInfo& rule, std::vector<DeviceTensors>& devices,
                 const std::vector<StepParams>& steps, KeepAlive keep_alive);

// The update by itself, where the controls hold the norm.
void launch_update(const RuleInfo& rule, std::vector<DeviceTensors>& devices,
                   const std::vector<StepParams>& steps, KeepAlive keep_alive);

}  // namespace fusedopt
