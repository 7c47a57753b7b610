#include "torch/device_tensors.h"

#include <algorithm>

#include "torch/aten.h"
#include "torch/cuda_stream.h"
#include "torch/keep_alive.h"

namespace fusedopt {

namespace {

// The emulator has the memory of one device only. To test several devices, its build decides by
// this macro which device a tensor belongs to.
#if !defined(FUSEDOPT_DEVICE_KEY)
#define FUSEDOPT_DEVICE_KEY(tensor) (tensor).device()
#endif

}  // namespace

int DeviceTensors::add(const TensorInfo& info, const TensorPointers& where) {
  infos.push_back(info);
  pointers.push_back(where);
  return static_cast<int>(infos.size()) - 1;
}

void DeviceTensors::begin(const RuleInfo& its_rule, size_t groups, bool runs_on_cuda) {
  on_cuda = runs_on_cuda;
  rule = &its_rule;
  grads.resize(infos.size());
  num_groups = groups;
  group_table.resize(groups * (sizeof(Group) / sizeof(double) + its_rule.num_hyperparameters));
  control = new_zeros(sizeof(StepControl) / sizeof(double), at::kDouble, device);
}

// Tables that another stream may still read, or that only a replay fills, are for a new plan.
bool DeviceTensors::renew_tables() {
  if (device.is_cuda() && !is_alloc_stream_current(*this)) return false;
  tables_are_current = false;
  return true;
}

at::Tensor DeviceTensors::chunk_sums() const {
  const int64_t bytes = layout->num_chunks() * static_cast<int64_t>(sizeof(double));
  return workspace.narrow(0, layout->chunk_sums_at(), bytes).view(at::kDouble);
}

StepParams DeviceTensors::step_params(SegmentKind segments) {
  if (!workspace.defined() || segments > segments_) make_workspace(segments);
  if (!tables_are_current) upload_tables();
  StepParams step{};
  layout->bind(static_cast<char*>(workspace.data_ptr()), step);
  if (segments == SegmentKind::kNone) step.chunk_coefs = nullptr;
  if (segments != SegmentKind::kRows) step.part_sums = nullptr;
  step.grads = grads.data();
  step.groups = group(0);
  step.has_unclipped =
      std::any_of(group(0), group(num_groups), [](const Group& it) { return it.is_unclipped; });
  step.control = static_cast<StepControl*>(control.data_ptr());
  if (param_ring.defined()) {
    step.telemetry.params = static_cast<ParamRow*>(param_ring.data_ptr());
    step.telemetry.rows = param_ring.size(0);
    if (step_ring.defined()) step.telemetry.steps = step_ring.data_ptr<double>();
  }
  return step;
}

// A step whose limit needs more room than earlier ones makes the workspace anew.
void DeviceTensors::make_workspace(SegmentKind segments) {
  segments_ = std::max(segments, segments_);
  Needs needs{};
  needs.on_cuda = on_cuda;
  needs.telemetry = param_ring.defined();
  needs.segments = segments_;
  needs.trust_ratio = rule->has_trust_ratio;
  needs.num_groups = static_cast<int64_t>(num_groups);
  needs.num_hyperparameters = rule->num_hyperparameters;
  needs.num_states = static_cast<int>(rule->states.size());
  needs.num_scalars = static_cast<int>(rule->scalars.size());
  layout.emplace(infos, needs);
  workspace = new_empty(layout->bytes(), at::kByte, device);
  tables_are_current = false;
}

void DeviceTensors::upload_tables() {
  const std::vector<char> tables = layout->tables(pointers);
  const int status =
      upload(kernels_device(*this), workspace.data_ptr(), tables.data(), tables.size());
  check_launch(status, device);
  tables_are_current = true;
}

Device kernels_device(const DeviceTensors& tensors) {
  Device result;
  result.is_cuda = tensors.on_cuda;
  if (!tensors.on_cuda) return result;
  result.index = std::max<int>(0, tensors.device.index());
  result.stream = current_stream(tensors.device);
  return result;
}

at::Tensor control_slot(const DeviceTensors& tensors, size_t offset) {
  return tensors.control.narrow(0, static_cast<int64_t>(offset / sizeof(double)), 1);
}

size_t device_tensors_for(const at::Tensor& tensor, std::vector<DeviceTensors>& devices) {
  const c10::Device key = FUSEDOPT_DEVICE_KEY(tensor);
  const auto found = std::find_if(devices.begin(), devices.end(),
                                  [&](const DeviceTensors& it) { return it.device_key == key; });
  if (found != devices.end()) return found - devices.begin();
  DeviceTensors& device_tensors = devices.emplace_back();
  device_tensors.device = tensor.device();
  device_tensors.device_key = key;
  return devices.size() - 1;
}

}  // namespace fusedopt
