// The tensors of one device, as the kernels see them, and their workspace.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <optional>
#include <vector>

#include "kernels.h"

namespace fusedopt {

// A parameter with gaps between its elements, and a dense copy. The kernels work on the copy.
struct DenseParam {
  c10::TensorImpl* param;  // not owned
  int index;               // index among the tensors of its device
  at::Tensor dense;
  at::Tensor original;  // the parameter, during a step
};

struct DeviceTensors {
  c10::Device device = at::kCPU;
  c10::Device device_key = at::kCPU;  // tells devices apart; differs from `device` only in tests
  bool on_cuda = false;
  const RuleInfo* rule = nullptr;
  std::vector<TensorInfo> infos;
  std::vector<TensorPointers> pointers;
  std::vector<const void*> grads;  // null: no gradient at this step
  size_t num_groups = 0;
  std::vector<double> group_table;  // the groups, followed by their hyperparameters
  std::vector<DenseParam> dense_params;
  std::vector<at::Tensor> dense_grads;  // copies of this step's gradients with other strides
  at::Tensor step_ring, param_ring;     // telemetry; undefined: it is off
  at::Tensor control;                   // a StepControl
  at::Tensor limit_state;               // the adaptive limit's state, during a step
  at::Tensor found_inf;                 // whether a rank asks for a skip, during a step

  std::optional<Layout> layout;
  at::Tensor workspace;
  bool tables_are_current = false;          // false: copy the tables to the workspace again
  std::optional<c10::Stream> alloc_stream;  // CUDA only: the current stream at the first step

  // Adds a tensor, and returns its index.
  int add(const TensorInfo& info, const TensorPointers& pointers);

  // Call it after all tensors are added.
  void begin(const RuleInfo& its_rule, size_t groups, bool runs_on_cuda);

  Group* group(size_t index) { return reinterpret_cast<Group*>(group_table.data()) + index; }
  double* hyperparameters(size_t index) {
    return reinterpret_cast<double*>(group(num_groups)) + index * rule->num_hyperparameters;
  }

  // After a pointer has changed. False: the tables can't be renewed here, as for a captured graph.
  bool renew_tables();

  // The last step's entry of every chunk in StepParams::chunk_sums: float64, shape (chunks,).
  at::Tensor chunk_sums() const;

  // The StepParams of a step whose limit has segments of this kind. The caller sets the options.
  StepParams step_params(SegmentKind segments);

 private:
  void make_workspace(SegmentKind segments);
  void upload_tables();

  SegmentKind segments_ = SegmentKind::kNone;
};

// The device's index and its current stream.
Device kernels_device(const DeviceTensors& tensors);

// The double at this offset of the StepControl, as a tensor of shape (1,).
at::Tensor control_slot(const DeviceTensors& tensors, size_t offset);

// The index in `devices` of the tensor's device. Adds an entry for the first tensor of a device.
size_t device_tensors_for(const at::Tensor& tensor, std::vector<DeviceTensors>& devices);

}  // namespace fusedopt
