// Param groups, from Python's dicts to plain numbers.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "kernels.h"

namespace fusedopt {

bool has_kernels(at::ScalarType type);
Storage to_storage(at::ScalarType type);  // one that has kernels

// A mapping of any type as a dict: itself, where it is one.
py::object as_dict(py::handle mapping);

// An optimizer's param groups as they are at this moment. Whatever Python code does with the lists
// and dicts meanwhile, these stay.
class CurrentGroups {
 public:
  // Takes any iterable of mappings, whose "params" are any iterable that can be walked again. May
  // run any Python code.
  void read(py::handle param_groups);
  void clear() { groups_.clear(); }

  size_t size() const { return groups_.size(); }
  PyObject* group(size_t index) const { return groups_[index].first.ptr(); }    // a dict
  PyObject* params(size_t index) const { return groups_[index].second.ptr(); }  // a list or tuple

 private:
  std::vector<std::pair<py::object, py::object>> groups_;
};

// Reads the options that the rule names, into `hyperparameters`. A tensor lr on `device` is left
// there: only its address is taken, so that reading it waits for nothing. Any other tensor is read
// here and now. May run any Python code.
Group read_group(const RuleInfo& rule, const std::vector<PyObject*>& names, PyObject* group,
                 c10::Device device, double* hyperparameters);

}  // namespace fusedopt
