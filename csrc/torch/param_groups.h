// Param groups, from Python's dicts to plain numbers.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include "kernels.h"

namespace fusedopt {

bool has_kernels(at::ScalarType type);
Dtype to_dtype(at::ScalarType type);  // one that has kernels

// Reads the hyperparameters that the rule names. A tensor lr on `device` is left there: only its
// address is taken, so that reading it waits for nothing. Any other tensor is read here and now.
Group read_group(const RuleInfo& rule, const std::vector<PyObject*>& names, PyObject* group,
                 c10::Device device);

}  // namespace fusedopt
