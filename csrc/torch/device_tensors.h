// The tensors of one device: what the kernels are to see of them, and their workspace.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <optional>
#include <vector>

#include "kernels.h"

namespace fusedopt {

// A parameter with gaps between its elements, and the dense copy that the kernels see.
struct DenseParam {
  c10::TensorImpl* param;  // not owned
  int index;               // in the tensors of its device
  at::Tensor dense;
  at::Tensor original;  // the parameter, during a step
};

struct DeviceTensors {
  c10::Device device = at::kCPU;
  c10::Device device_key = at::kCPU;  // tells devices apart: `device`, but for tests
  bool on_cuda = false;
  const RuleInfo* rule = nullptr;
  std::vector<TensorInfo> infos;
  std::vector<TensorPointers> pointers;
  std::vector<const void*> grads;  // null: no gradient at this step
  size_t num_groups = 0;
  std::vector<double> group_table;  // the groups, and behind them their hyperparameters
  std::vector<DenseParam> dense_params;
  std::vector<at::Tensor> dense_grads;  // of gradients laid out otherwise, at this step
  at::Tensor step_ring, param_ring;     // telemetry, if it was asked for
  at::Tensor control;                   // a StepControl
  at::Tensor limit_state;               // of an adaptive limit, at this step

  std::optional<Layout> layout;
  at::Tensor workspace;
  bool tables_are_current = false;          // in the workspace; false: a pointer has moved
  std::optional<c10::Stream> alloc_stream;  // CUDA only: the current one at the first step

  // One more tensor; returns its index.
  int add(const TensorInfo& info, const TensorPointers& pointers);

  // Once all tensors are known.
  void begin(const RuleInfo& its_rule, size_t groups, bool runs_on_cuda);

  Group* group(size_t index) { return reinterpret_cast<Group*>(group_table.data()) + index; }
  double* hyperparameters(size_t index) {
    return reinterpret_cast<double*>(group(num_groups)) + index * rule->num_hyperparameters;
  }

  // The sum of every chunk, as the last step has left them: float64, shape (chunks,).
  at::Tensor chunk_sums() const;

  // All but the options, for a step whose limit looks at these segments.
  StepParams step_params(SegmentKind segments);

 private:
  void make_workspace(SegmentKind segments);
  void upload_tables();

  SegmentKind segments_ = SegmentKind::kNone;
};

// The device's index and its current stream.
Device kernels_device(const DeviceTensors& tensors);

// The double at that offset in the control of these tensors, shape (1,).
at::Tensor control_slot(const DeviceTensors& tensors, size_t offset);

// The entry of the tensor's device: a new one for the first tensor on it.
size_t device_tensors_for(const at::Tensor& tensor, std::vector<DeviceTensors>& devices);

}  // namespace fusedopt
