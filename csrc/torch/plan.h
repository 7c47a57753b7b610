// What step() would otherwise look up for every tensor, every time: pointers, sizes, chunks.
//
// A plan owns no tensor of the caller's. It remembers where it saw each one, looks again at every
// step, and says so when anything has moved; then Python checks all anew and makes a new plan.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>
#include <vector>

#include "torch/device_tensors.h"
#include "torch/tensor_guard.h"

namespace fusedopt {

// One parameter.
struct PlanParam {
  TensorGuard guard;
  TensorGuard grad_guard;               // at the last step; often it is there again
  const void* autograd_meta = nullptr;  // which holds the gradient; only to prefetch it
  uint32_t group = 0;
  int device_tensors = 0;  // which of the devices
  int index = 0;           // in the partition
  int items = 0;           // of its state that were found
  bool complete = false;   // all of them: else its first gradient asks for a new plan
  c10::Device device = at::kCPU;
  at::ScalarType dtype = at::kFloat;
  at::ScalarType grad_dtype = at::kFloat;  // as the kernels read it
  int64_t storage_offset = 0;
  c10::DimVector sizes, strides;
  c10::DimVector dense_strides;  // the layout of the states, and of what the kernels see
};

// One item of a parameter's state: a scalar such as `step`, or a tensor shaped as the parameter.
struct StateItem {
  PyObject* key;
  TensorGuard guard;  // of nothing, where it is somebody else's and may change as it likes
  int64_t storage_offset;
  caffe2::TypeMeta dtype;
  bool is_tensor;

  bool laid_out_as(const PlanParam* plan_param) const;
};

class Plan {
 public:
  // `counters`: by parameter, the scalar that the rule keeps apart from the state, if it has one.
  // `rings`: for telemetry, that of the steps and one per device, as Python's Rings has them; or
  // empty.
  Plan(const std::string& rule, const std::string& backend, const py::list& param_groups,
       const py::dict& state, const py::dict& counters, const std::vector<at::Tensor>& rings);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Looks at all parameters, states and gradients again. False: one of them is not as it was.
  bool refresh(const py::list& param_groups, const py::dict& state);

  const RuleInfo& rule() const { return rule_; }
  std::vector<DeviceTensors>& devices() { return devices_; }
  // Owners of all that a pass reads and writes, for as long as Python may run beside it. Not the
  // tensors: another thread may give one of them other memory.
  std::vector<c10::Storage> keep_alive() const;

  // (group, index in the group) of the parameters whose gradients' squares don't sum up to a finite
  // number. Waits for the device.
  std::vector<std::pair<int, int>> nonfinite() const;

 private:
  // One entry of optimizer.state, in its order.
  struct StateEntry {
    PyObject* key;
    PyObject* value;
    uint64_t version;             // of the dict, when its items were looked at
    const PlanParam* plan_param;  // null where the key is not one of the parameters
    int first_item, last_item;    // of items_
  };

  void add_param(PyObject* param, uint32_t group);
  void add_state(PlanParam& plan_param, PyObject* state);
  void add_counter(PlanParam& plan_param, PyObject* counter);

  bool same_lists(const py::list& param_groups) const;
  bool same_state(const py::dict& state);
  bool same_entries(const py::dict& state) const;
  bool same_items(const StateEntry& entry) const;
  bool same_groups(const py::list& param_groups);
  bool same_param(const PlanParam& plan_param) const;
  bool gather_grad(PlanParam& plan_param);

  const RuleInfo& rule_;
  std::vector<PyObject*> names_;          // of the hyperparameters
  std::vector<std::vector<int>> listed_;  // by group: the sources, in the order of its list
  std::vector<uint32_t> states_used_;     // by group
  std::vector<PlanParam> params_;         // each parameter once
  std::vector<StateEntry> state_entries_;
  uint64_t state_version_ = 0;    // of optimizer.state, when its entries were looked at
  std::vector<StateItem> items_;  // of all entries, in the order of their dicts
  std::vector<DeviceTensors> devices_;
};

}  // namespace fusedopt
