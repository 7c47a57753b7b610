// Reads Python's param groups into plain numbers.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "kernels.h"
#include "torch/python.h"

namespace fusedopt {

// The storage in which kernels read tensors of this dtype. Nothing if no kernel takes them.
std::optional<Storage> storage_of(at::ScalarType type);
bool has_kernels(at::ScalarType type);
Storage to_storage(at::ScalarType type);  // throws TypeError where there is none

// Returns a dict as it is, and any other mapping as a dict.
py::object as_dict(py::handle mapping);

// A snapshot of an optimizer's param groups. It stays the same even if Python code changes the
// lists and dicts.
class CurrentGroups {
 public:
  // `param_groups` is an iterable of mappings. Each mapping's "params" is an iterable that can be
  // read more than once. Reading them may run Python code.
  void read(py::handle param_groups);
  void clear() { groups_.clear(); }

  size_t size() const { return groups_.size(); }
  PyObject* group(size_t index) const { return groups_[index].first.ptr(); }    // a dict
  PyObject* params(size_t index) const { return groups_[index].second.ptr(); }  // a list or tuple

 private:
  std::vector<std::pair<py::object, py::object>> groups_;
};

// Reads the options that the rule names into `hyperparameters`, and "clipped", which may be missing
// and is then true. If lr is a tensor on `device`, only
// its address is read: nothing waits for the device. All other tensors are read at once. May run
// Python code.
Group read_group(const RuleInfo& rule, const std::vector<PyObject*>& names, PyObject* group,
                 c10::Device device, double* hyperparameters);

}  // namespace fusedopt
