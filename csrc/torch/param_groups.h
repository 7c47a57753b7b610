// Param groups, from Python's dicts to plain numbers.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "kernels.h"

namespace fusedopt {

bool has_kernels(at::ScalarType type);
Storage to_storage(at::ScalarType type);  // one that has kernels

// Reads the options that the rule names, into `hyperparameters`. A tensor lr on `device` is left
// there: only its address is taken, so that nothing waits for it. Any other tensor is read here and
// now.
Group read_group(const RuleInfo& rule, const std::vector<PyObject*>& names, PyObject* group,
                 c10::Device device, double* hyperparameters);

}  // namespace fusedopt
