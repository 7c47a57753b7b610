#include "torch/step.h"

#include <ATen/ops/where.h>

#include <algorithm>

namespace fusedopt {

namespace {

// A 0-d float32 on the partition's device, kept alive by `owner`.
const float* scalar_on(const std::optional<at::Tensor>& scalar, c10::Device device,
                       std::vector<at::Tensor>& owner) {
  if (!scalar.has_value()) return nullptr;
  owner.push_back(scalar->to(device, at::kFloat));
  return owner.back().const_data_ptr<float>();
}

bool is_by_tensor(const AdaptiveClipRequest& clip) {
  return static_cast<ClipKind>(clip.kind) == ClipKind::kPerTensor;
}

// `is_first`: a limit's state lies on this device, as the first parameter does.
StepParams make_pass(DeviceTensors& device_tensors, bool is_first, const StepRequest& request,
                     std::vector<at::Tensor>& owner) {
  StepParams step = device_tensors.step();
  step.options.max_grad_norm = request.max_grad_norm;
  step.options.skip_nonfinite = request.skip_nonfinite;
  step.options.measure = request.measure;
  step.options.grad_scale = scalar_on(request.grad_scale, device_tensors.device, owner);
  step.options.found_inf = scalar_on(request.found_inf, device_tensors.device, owner);
  if (request.clip.has_value()) {
    const AdaptiveClipRequest& clip = *request.clip;
    step.options.clip.kind = static_cast<ClipKind>(clip.kind);
    std::copy_n(clip.arguments.begin(), std::min<size_t>(clip.arguments.size(), kMaxClipArguments),
                step.options.clip.arguments);
    owner.push_back(clip.state.to(device_tensors.device, at::kDouble, false, /*copy=*/!is_first));
    step.options.clip.state = owner.back().data_ptr<double>();
    device_tensors.clip_state = owner.back();
    step.updates_limit = is_by_tensor(clip) || is_first;
    step.own_clips = device_tensors.clips_for(step.options.clip.kind);
  }
  return step;
}

// What the other devices have learned, each of its own tensors, in its own copy.
void gather_clip_states(const std::vector<DeviceTensors>& devices, const AdaptiveClipRequest& clip,
                        const at::Tensor& before) {
  at::Tensor state = clip.state;
  for (size_t i = 1; i < devices.size(); ++i) {
    const at::Tensor now = devices[i].clip_state.to(state.device());
    state.copy_(at::where(now.ne(before), now, state));
  }
}

// Parameters with gaps between their elements: the kernels see a dense copy.
void load_dense_params(DeviceTensors& device_tensors) {
  for (DenseParam& it : device_tensors.dense_params) {
    if (device_tensors.grads[it.index] == nullptr) continue;
    const auto param = c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(it.param);
    it.original = at::Tensor::wrap_tensor_impl(param).detach();
    it.dense.copy_(it.original);
  }
}

void store_dense_params(DeviceTensors& device_tensors) {
  for (DenseParam& it : device_tensors.dense_params) {
    if (device_tensors.grads[it.index] == nullptr) continue;
    it.original.copy_(it.dense);
    it.original.reset();
  }
}

}  // namespace

void step(const RuleInfo& rule, std::vector<DeviceTensors>& devices, const StepRequest& request,
          KeepAlive keep_alive) {
  if (devices.empty()) return;
  devices[0].control = request.control;

  std::vector<at::Tensor> owner;
  std::vector<StepParams> passes;
  for (DeviceTensors& device_tensors : devices) {
    load_dense_params(device_tensors);
    passes.push_back(make_pass(device_tensors, passes.empty(), request, owner));
  }
  if (devices.size() > 1 && devices[0].step_ring.defined()) {
    // What a step's own row says of all devices has to be known before the update writes it.
    for (StepParams& step : passes) step.options.measure = true;
  }
  const bool gathers = passes.size() > 1 && request.clip.has_value() && is_by_tensor(*request.clip);
  const at::Tensor before = gathers ? request.clip->state.clone() : at::Tensor();
  run(rule, devices, passes, Phases::kBoth, keep_alive);
  if (gathers) gather_clip_states(devices, *request.clip, before);
  for (DeviceTensors& device_tensors : devices) {
    store_dense_params(device_tensors);
    device_tensors.dense_grads.clear();
    device_tensors.clip_state.reset();
  }
}

}  // namespace fusedopt
