// Clips a list of gradients, for any optimizer: measures their norm, then scales them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "torch/python.h"

namespace fusedopt {

struct ClipCall {
  double max_norm;      // infinity: only measure
  double norm_type;     // 2 or infinity
  bool skip_nonfinite;  // leave the gradients as they are if the norm is inf or nan
  // The norm, if it is already known: a number, or one element of any dtype on any device.
  std::optional<std::variant<at::Tensor, double>> total_norm;
};

// The norm, 0-d float64 on the first gradient's device (nothing if there is no gradient), and
// whether any gradient is float64.
using ClipResult = std::pair<std::optional<at::Tensor>, bool>;

// Clips the gradients of the tensors, or the tensors themselves unless `of_params` is set. A
// gradient that is listed several times is scaled once, and counts in the norm each time.
//
// Returns nothing, and has changed nothing, if these kernels don't take one of the gradients, if
// two gradients share memory, or if a gradient is not dense and Python has not checked it yet.
// `checked` says that Python has.
std::optional<ClipResult> clip_grads(const py::list& tensors, bool of_params, bool checked,
                                     const std::string& backend, const ClipCall& call);

// The indices of two tensors that share some of their elements, but not all. Nothing if there are
// none.
std::optional<std::pair<int, int>> first_overlap(const std::vector<at::Tensor>& grads);

}  // namespace fusedopt
