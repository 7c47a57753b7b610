// One step: a plan's tensors and Python's options, packed into plain structs for the kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "torch/keep_alive.h"

namespace fusedopt {

// A limit that adapts itself: Python's AdaptiveClip.
struct LimitTensors {
  int kind;
  std::vector<double> arguments;
  at::Tensor state;  // float64, on the first parameter's device
};

// What one call of optimizer.step() asks for.
struct StepCall {
  double max_grad_norm;                  // infinity: never clip
  std::optional<LimitTensors> limit;     // a limit below it
  bool measure;                          // the norm first: `skip_nonfinite` and clipping need it
  bool skip_nonfinite;                   // leave all as it was when a gradient holds inf or nan
  std::optional<at::Tensor> grad_scale;  // 0-d: the gradients are to be divided by it
  std::optional<at::Tensor> found_inf;   // 0-d: not zero asks for a skip
  at::Tensor control;                    // float64, a StepControl on the first parameter's device
};

// Of tensors and gradients as the plan has just found them.
void step(const RuleInfo& rule, std::vector<DeviceTensors>& devices, const StepCall& call,
          KeepAlive keep_alive);

}  // namespace fusedopt
