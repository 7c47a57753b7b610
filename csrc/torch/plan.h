// A plan remembers pointers, sizes and chunks, so that step() need not look them up every time.
//
// A plan does not own the caller's tensors. It compares them with what it remembers at every step,
// and takes over pointers that have changed. If anything else has changed, it returns false: Python
// then checks everything and makes a new plan.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "torch/device_tensors.h"
#include "torch/memory_overlap.h"
#include "torch/param_groups.h"
#include "torch/python.h"
#include "torch/tensor_guard.h"

namespace fusedopt {

// One parameter.
struct PlanParam {
  TensorGuard guard;
  // Where the gradient was at the last step. It is probably there again, and is prefetched.
  const void* autograd_meta = nullptr;
  const c10::TensorImpl* grad_impl = nullptr;
  const c10::StorageImpl* grad_storage = nullptr;
  const void* known_grad =
      nullptr;  // a gradient's address that is known not to overlap written tensors
  const void** grad =
      nullptr;            // the pointer that the kernels get; *grad is null without a gradient
  size_t grad_bytes = 0;  // the gradient's size in grad_dtype
  uint32_t group = 0;
  int device_tensors = -1;   // index in Plan::devices_; -1: on none of them
  int index = 0;             // index in the DeviceTensors
  int written = -1;          // index in Plan::written_; -1: not there
  int items = 0;             // how many items of its state were found
  bool has_kernels = false;  // false: it is left alone as long as it has no gradient
  bool odd_state = false;    // its state is neither a dict nor None
  bool complete = false;     // all of its state exists; false: its first gradient needs a new plan
  c10::Device device = at::kCPU;
  at::ScalarType dtype = at::kFloat;
  at::ScalarType grad_dtype = at::kFloat;  // in which kernels read the gradient
  c10::DimVector sizes, strides;
  c10::DimVector dense_strides;  // the strides of its states and of the arrays that kernels see
};

// The dtype in which kernels read a gradient: the parameter's own, or the dtype that the parameter
// is computed in.
inline at::ScalarType grad_dtype_for(at::ScalarType param, at::ScalarType grad) {
  if (grad == param) return param;
  return param == at::kDouble ? at::kDouble : at::kFloat;
}

// How the arrays of a group are stored, as fusedopt/core/formats.py has resolved its options.
struct GroupFormat {
  int master_bits = 0;             // 16-bit parameters have masters of so many bits: 0, 24 or 32
  bool stochastic_param = false;   // bfloat16 parameters are rounded at random
  unsigned stochastic_states = 0;  // bit k: of the rule's kStates[k], if it is bfloat16
  uint64_t seed = 0;
  bool in_blocks = false;  // the states have 8 bits
};

// One item of a parameter's state.
struct StateItem {
  // A scalar such as `step`, or a tensor shaped as the parameter: a state, the rest of a master, or
  // the codes of a state of 8 bits. A state of 8 bits also has a float32 scale for each block.
  enum class Kind { kScalar, kState, kRest, kCodes, kScales };

  PyObject* key;
  TensorGuard guard;  // empty: the item is a user's, and may change freely
  Kind kind = Kind::kScalar;
  at::ScalarType dtype = at::kFloat;  // of all but a kState
  int index = 0;                      // index among the rule's states, or its scalars
  int written = -1;                   // index in Plan::written_; -1: not there

  // Whether a step can use an object as this item.
  bool takes(PyObject* object, const PlanParam& plan_param) const;
  // Whether a tensor has this item's shape, and its elements lie where a step expects them.
  bool fits(const c10::TensorImpl* impl, const PlanParam& plan_param) const;
  MemoryRegion region(const PlanParam& plan_param) const;
};

class Plan {
 public:
  // `counters` maps a parameter to the scalar that its rule keeps outside of the state, if there is
  // one. `rings` are telemetry's: the ring of the steps, then one per device. It is empty without
  // telemetry. `formats` has one entry per group; it is empty if all arrays are stored as their
  // dtypes say. `first_elements` has one entry per parameter that is listed first: the index of its
  // element 0 in the whole tensor. It is empty if no parameter is a part of a tensor.
  Plan(const std::string& rule, const std::string& backend, const py::object& param_groups,
       const py::object& state, const py::dict& counters, const std::vector<at::Tensor>& rings,
       std::vector<GroupFormat> formats, std::vector<int64_t> first_elements);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Reads the groups and their hyperparameters, which may run Python code. Returns false if they
  // are not this plan's groups, or if the rule can't use them.
  bool read_groups(const py::object& param_groups);

  // Compares all parameters, states and gradients with the plan, and runs no Python code. Returns
  // false if the plan can't take one of them.
  bool refresh(const py::dict& state);

  const RuleInfo& rule() const { return rule_; }
  std::vector<DeviceTensors>& devices() { return devices_; }
  // The storages that a step reads and writes. The caller holds them while other Python threads may
  // run. Holding the tensors is not enough: another thread may give a tensor other memory.
  std::vector<c10::Storage> keep_alive() const;

  // Tells autograd of the update, as any other in-place operation does.
  void bump_versions() const;

  // Two tensors that share memory and that a step would both write, as seen when the plan was made.
  // Each is (group, index in the group, name of the state or "").
  using Place = std::tuple<int, int, std::string>;
  const std::optional<std::pair<Place, Place>>& shared_memory() const { return shared_; }

  // The parameters whose gradients have a sum of squares that is not finite, as (group, index in
  // the group). Waits for the device.
  std::vector<std::pair<int, int>> nonfinite() const;

  // While such an object lives, no other step of the plan can begin.
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
  // One entry of optimizer.state. Entries are kept in the order of the dict.
  struct StateEntry {
    PyObject* key;
    PyObject* value;
    uint64_t version;           // the dict's version when its items were read
    int param;                  // -1: the key is not one of the parameters
    int first_item, last_item;  // the range in items_
  };
  // A tensor that a step writes.
  struct Written {
    int param;
    std::string state;    // the state's name; empty: the parameter itself
    MemoryRegion region;  // where it was when its parameter last had a gradient
  };

  void add_param(PyObject* param, uint32_t group, const std::string& backend);
  void add_entry(PlanParam& plan_param, const at::Tensor& param);
  void lay_out(PlanParam& plan_param, const at::Tensor& param);
  void add_state(PlanParam& plan_param, PyObject* state);
  void name_item(PlanParam& plan_param, StateItem& item, const char* name, PyObject* value);
  void add_item(PlanParam& plan_param, StateItem& item, PyObject* value);
  int expected_items(const PlanParam& plan_param);
  void add_counter(PlanParam& plan_param, PyObject* counter);
  void find_written();
  MemoryRegion region_of(const PlanParam& plan_param) const;
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
    return unpack(plan_param.guard.object).unsafeGetTensorImpl()->grad();
  }
  TensorInfo& info_of(const PlanParam& plan_param) {
    return devices_[plan_param.device_tensors].infos[plan_param.index];
  }
  TensorPointers& pointers_of(const PlanParam& plan_param) {
    return devices_[plan_param.device_tensors].pointers[plan_param.index];
  }

  const RuleInfo& rule_;
  std::vector<PyObject*> names_;  // of the rule's options
  std::vector<std::vector<int>>
      listed_;                         // per group: indices into params_, in the order of its list
  std::vector<uint32_t> states_used_;  // per group
  std::vector<GroupFormat> formats_;   // per group
  std::vector<int64_t> first_elements_;  // as the constructor was given
  std::vector<PlanParam> params_;        // each parameter once
  std::vector<StateEntry> state_entries_;
  uint64_t state_version_ = 0;    // of optimizer.state, when its entries were read
  std::vector<StateItem> items_;  // the items of all entries, in the order of the dicts
  std::vector<DeviceTensors> devices_;
  std::vector<Written> written_;                // of parameters whose state is complete
  std::vector<std::pair<int, int>> conflicts_;  // indices into written_: two that share memory
  CoveredMemory covered_;                       // the memory of all of written_
  std::optional<std::pair<Place, Place>> shared_;
  CurrentGroups groups_;                   // filled during a step
  const void* no_grad_ = nullptr;          // PlanParam::grad of parameters on no device
  std::vector<c10::TensorImpl*> stepped_;  // the parameters with a gradient, at this step
  bool in_use_ = false;
  bool moved_ = false;  // whether a pointer has changed at this step
};

}  // namespace fusedopt
