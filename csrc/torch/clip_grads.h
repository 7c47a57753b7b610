// Clipping by itself, for any optimizer: the norm of a list of gradients, and their scaling.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <utility>
#include <variant>

namespace fusedopt {

struct ClipCall {
  double max_norm;      // infinity: only measure
  double norm_type;     // 2 or infinity
  bool skip_nonfinite;  // leave the gradients as they are where the norm is inf or nan
  // The norm where it is known already: one element of any dtype, on any device.
  std::optional<std::variant<at::Tensor, double>> total_norm;
};

// The norm (0-d float64 on the first gradient's device, or nothing where there is no gradient), and
// whether a gradient is float64.
using ClipResult = std::pair<std::optional<at::Tensor>, bool>;

// Of the tensors' gradients or, unless `of_params`, of the tensors themselves. Each is scaled once,
// however often it is listed, and counts in the norm as often as it is listed.
//
// Nothing: one of them is not for these kernels, or lies in memory in a way that Python is to look
// at before it is written to (`checked`: it did), or two of them share memory, and nothing was
// done.
std::optional<ClipResult> clip_grads(const py::list& tensors, bool of_params, bool checked,
                                     const std::string& backend, const ClipCall& call);

// Two of these tensors that have some element in common, and not just the same elements.
std::optional<std::pair<int, int>> first_overlap(const std::vector<at::Tensor>& grads);

}  // namespace fusedopt
