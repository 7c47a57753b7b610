// What step() would otherwise look up for every tensor, every time: pointers, sizes, chunks.
//
// A plan owns no tensor of the caller's. It remembers where it saw each one and looks again at
// every step. Pointers that have changed it takes over. Where anything else has changed it says so;
// then Python checks all anew and makes a new plan.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "torch/device_tensors.h"
#include "torch/memory_overlap.h"
#include "torch/param_groups.h"
#include "torch/tensor_guard.h"

namespace fusedopt {

// One parameter.
struct PlanParam {
  TensorGuard guard;
  // Where the gradient was at the last step, to prefetch what is likely to be there again.
  const void* autograd_meta = nullptr;
  const c10::TensorImpl* grad_impl = nullptr;
  const c10::StorageImpl* grad_storage = nullptr;
  const void* known_grad = nullptr;  // shares no memory with what a step writes
  const void** grad = nullptr;       // what the kernels see of it; null there: it has none
  size_t grad_bytes = 0;             // as the kernels read it
  uint32_t group = 0;
  int device_tensors = -1;   // which of the devices; none: no memory there
  int index = 0;             // in the DeviceTensors
  int written = -1;          // its place in Plan::written_
  int items = 0;             // of its state that were found
  bool has_kernels = false;  // else it is left alone, as long as it has no gradient
  bool complete = false;  // all of its state is there: else its first gradient asks for a new plan
  c10::Device device = at::kCPU;
  at::ScalarType dtype = at::kFloat;
  at::ScalarType grad_dtype = at::kFloat;  // as the kernels read it
  c10::DimVector sizes, strides;
  c10::DimVector dense_strides;  // the layout of the states, and of what the kernels see
};

// The dtype in which kernels read a gradient: the parameter's own, or the one it is computed in.
inline at::ScalarType grad_dtype_for(at::ScalarType param, at::ScalarType grad) {
  if (grad == param) return param;
  return param == at::kDouble ? at::kDouble : at::kFloat;
}

// One item of a parameter's state: a scalar such as `step`, or a tensor shaped as the parameter.
struct StateItem {
  PyObject* key;
  TensorGuard guard;       // of nothing, where it is somebody else's and may change as it likes
  bool is_tensor = false;  // else a scalar
  int index = 0;           // among the rule's states, or its scalars
  int written = -1;        // its place in Plan::written_

  // Whether a step can use an object as this item.
  bool takes(PyObject* object, const PlanParam& plan_param) const;
  bool laid_out_as(const PlanParam& plan_param) const {
    if (!is_tensor) return guard.impl->dim() == 0;
    return has_layout(guard.impl, plan_param.sizes, plan_param.dense_strides);
  }
};

class Plan {
 public:
  // `counters`: by parameter, the scalar that the rule keeps apart from the state, if it has one.
  // `rings`: for telemetry, that of the steps and one per device, as Python's Rings has them; or
  // empty.
  Plan(const std::string& rule, const std::string& backend, const py::object& param_groups,
       const py::object& state, const py::dict& counters, const std::vector<at::Tensor>& rings);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Reads the groups and their hyperparameters, which may run any Python code. False: they are not
  // this plan's, or not as the rule expects.
  bool read_groups(const py::object& param_groups);

  // Looks at all parameters, states and gradients again, and runs no Python code. False: one of
  // them is not as this plan can take it.
  bool refresh(const py::dict& state);

  const RuleInfo& rule() const { return rule_; }
  std::vector<DeviceTensors>& devices() { return devices_; }
  // What a step reads and writes, for as long as Python may run beside it. Not the tensors: another
  // thread may give one of them other memory.
  std::vector<c10::Storage> keep_alive() const;

  // Autograd learns of the update as of any other in-place operation.
  void bump_versions() const;

  // Two tensors that share memory, both of which a step would have written when the plan was made:
  // each as (group, index in the group, state or "").
  using Place = std::tuple<int, int, std::string>;
  const std::optional<std::pair<Place, Place>>& shared_memory() const { return shared_; }

  // (group, index in the group) of the parameters whose gradients' squares don't sum up to a finite
  // number. Waits for the device.
  std::vector<std::pair<int, int>> nonfinite() const;

  // While one lives, no other step of the plan begins.
  class Use {
   public:
    explicit Use(Plan& plan);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Plan& plan_;
  };

 private:
  // One entry of optimizer.state, in its order.
  struct StateEntry {
    PyObject* key;
    PyObject* value;
    uint64_t version;           // of the dict, when its items were looked at
    int param;                  // -1: the key is not one of the parameters
    int first_item, last_item;  // of items_
  };
  // A tensor that a step writes.
  struct Written {
    int param;
    std::string state;    // its name; empty: the parameter itself
    MemoryRegion region;  // where it was when its parameter last had a gradient
  };

  void add_param(PyObject* param, uint32_t group, const std::string& backend);
  void add_entry(PlanParam& plan_param, const at::Tensor& param);
  void lay_out(PlanParam& plan_param, const at::Tensor& param);
  void add_state(PlanParam& plan_param, PyObject* state);
  void add_item(PlanParam& plan_param, StateItem& item, PyObject* value);
  void add_counter(PlanParam& plan_param, PyObject* counter);
  void find_written();
  MemoryRegion region_of(const PlanParam& plan_param) const;
  MemoryRegion region_of(const StateItem& item, const PlanParam& plan_param) const;
  void find_shared_memory();

  bool same_lists() const;
  bool find_grads();
  bool same_state(const py::dict& state);
  bool same_entries(const py::dict& state) const;
  bool same_items(const StateEntry& entry);
  bool same_param(const PlanParam& plan_param) const;
  bool move_param(PlanParam& plan_param);
  bool take_param(PlanParam& plan_param);
  bool move_item(StateItem& item, PyObject* value, const PlanParam& plan_param);
  void use_item(const PlanParam& plan_param, StateItem& item, PyObject* value);
  bool gather_grad(PlanParam& plan_param, const at::Tensor& grad);
  bool is_apart(PlanParam& plan_param, const void* grad) const;
  bool after_moves();
  const std::pair<int, int>* conflict() const;
  Place place_of(const Written& written) const;
  void set_rings(const std::vector<at::Tensor>& rings);

  static const at::Tensor& grad_of(const PlanParam& plan_param) {
    return THPVariable_Unpack(plan_param.guard.object).unsafeGetTensorImpl()->grad();
  }
  TensorInfo& info_of(const PlanParam& plan_param) {
    return devices_[plan_param.device_tensors].infos[plan_param.index];
  }
  TensorPointers& pointers_of(const PlanParam& plan_param) {
    return devices_[plan_param.device_tensors].pointers[plan_param.index];
  }

  const RuleInfo& rule_;
  std::vector<PyObject*> names_;          // of the hyperparameters
  std::vector<std::vector<int>> listed_;  // by group: the parameters, in the order of its list
  std::vector<uint32_t> states_used_;     // by group
  std::vector<PlanParam> params_;         // each parameter once
  std::vector<StateEntry> state_entries_;
  uint64_t state_version_ = 0;    // of optimizer.state, when its entries were looked at
  std::vector<StateItem> items_;  // of all entries, in the order of their dicts
  std::vector<DeviceTensors> devices_;
  std::vector<Written> written_;                // of the parameters whose state is complete
  std::vector<std::pair<int, int>> conflicts_;  // of written_: two that share memory
  CoveredMemory covered_;                       // by all of written_
  std::optional<std::pair<Place, Place>> shared_;
  CurrentGroups groups_;                   // during a step
  const void* no_grad_ = nullptr;          // of parameters that are on no device
  std::vector<c10::TensorImpl*> stepped_;  // the parameters with a gradient, at this step
  bool in_use_ = false;
  bool moved_ = false;  // a pointer, at this step
};

}  // namespace fusedopt
