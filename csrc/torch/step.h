// One step: packs a plan's tensors and Python's options into plain structs for the kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "torch/exchange.h"
#include "torch/keep_alive.h"

namespace fusedopt {

// An adaptive limit of fusedopt.clip.
struct LimitTensors {
  int kind;
  std::vector<double> arguments;
  at::Tensor state;  // float64, on the first parameter's device
};

// The options of one call of optimizer.step().
struct StepCall {
  double max_grad_norm;                  // infinity: never clip
  std::optional<LimitTensors> limit;     // an adaptive limit, in addition to max_grad_norm
  bool measure;                          // measure first, as clipping and `skip_nonfinite` need
  bool skip_nonfinite;                   // change nothing if a gradient is inf or nan
  std::optional<at::Tensor> grad_scale;  // 0-d; the gradients are divided by it
  std::optional<at::Tensor> found_inf;   // 0-d; non-zero asks for a skip
  at::Tensor control;                    // float64, a StepControl on the first parameter's device
  Exchange exchange;                     // empty: nothing stands between measure and update
};

// Runs one step. Call it after the plan has looked up its tensors and gradients. Returns whether
// these may have changed: false if the step is known to have been skipped.
bool step(const RuleInfo& rule, std::vector<DeviceTensors>& devices, const StepCall& call,
          KeepAlive keep_alive);

}  // namespace fusedopt
