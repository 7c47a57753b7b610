#include "torch/step.h"

#include <algorithm>

#include "torch/aten.h"
#include "torch/launch.h"

namespace fusedopt {

namespace {

// The address of the scalar on the device, as float32. `kept` keeps its tensor alive.
const float* scalar_on(const std::optional<at::Tensor>& scalar, c10::Device device,
                       std::vector<at::Tensor>& kept) {
  if (!scalar.has_value()) return nullptr;
  kept.push_back(scalar->to(device, at::kFloat));
  return kept.back().const_data_ptr<float>();
}

LimitKind kind_of(const StepCall& call) {
  return call.limit.has_value() ? static_cast<LimitKind>(call.limit->kind) : LimitKind::kFixed;
}

// `is_first`: this is the first parameter's device, where the limit's state lies.
StepParams make_params(DeviceTensors& tensors, bool is_first, const StepCall& call,
                       std::vector<at::Tensor>& kept) {
  const LimitKind kind = kind_of(call);
  StepParams step = tensors.step_params(segment_kind(kind));
  StepOptions& options = step.options;
  options.max_grad_norm = call.max_grad_norm;
  options.skip_nonfinite = call.skip_nonfinite;
  options.measure = call.measure || call.exchange;
  options.grad_scale = scalar_on(call.grad_scale, tensors.device, kept);
  if (call.exchange) {  // this rank's own wish is in the message
    tensors.found_inf = new_zeros(1, at::kFloat, tensors.device);
    options.found_inf = tensors.found_inf.const_data_ptr<float>();
  } else {
    options.found_inf = scalar_on(call.found_inf, tensors.device, kept);
  }
  options.limit.kind = kind;
  if (kind == LimitKind::kFixed) return step;
  const std::vector<double>& arguments = call.limit->arguments;
  std::copy(arguments.begin(), arguments.end(), options.limit.arguments);
  tensors.limit_state =
      call.limit->state.to(tensors.device, at::kDouble, false, /*copy=*/!is_first);
  options.limit.state = tensors.limit_state.data_ptr<double>();
  step.updates_limit = kind == LimitKind::kPerTensor || is_first;
  return step;
}

// Every device has updated its own tensors in its own copy of the limit's state. Collects the
// changes in the first device's state.
void gather_limit_states(const std::vector<DeviceTensors>& devices, at::Tensor state,
                         const at::Tensor& before) {
  for (size_t i = 1; i < devices.size(); ++i) {
    const at::Tensor now = devices[i].limit_state.to(state.device());
    state.copy_(now.where(now.ne(before), state));
  }
}

// The kernels see a dense copy of a parameter that has gaps between its elements.
void load_dense_params(DeviceTensors& tensors) {
  for (DenseParam& it : tensors.dense_params) {
    if (tensors.grads[it.index] == nullptr) continue;
    const auto param = c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(it.param);
    it.original = at::Tensor::wrap_tensor_impl(param).detach();
    it.dense.copy_(it.original);
  }
}

void store_dense_params(DeviceTensors& tensors, bool changed) {
  for (DenseParam& it : tensors.dense_params) {
    if (changed && it.original.defined()) it.original.copy_(it.dense);
  }
}

// Its destructor releases the tensors that only a step needs, also if an exchange has thrown.
class StepEnd {
 public:
  explicit StepEnd(std::vector<DeviceTensors>& devices) : devices_(devices) {}
  StepEnd(const StepEnd&) = delete;
  StepEnd& operator=(const StepEnd&) = delete;
  ~StepEnd() {
    for (DeviceTensors& tensors : devices_) {
      for (DenseParam& it : tensors.dense_params) it.original.reset();
      tensors.dense_grads.clear();
      tensors.limit_state.reset();
      tensors.found_inf.reset();
    }
  }

 private:
  std::vector<DeviceTensors>& devices_;
};

}  // namespace

bool step(const RuleInfo& rule, std::vector<DeviceTensors>& devices, const StepCall& call,
          KeepAlive keep_alive) {
  if (devices.empty()) {
    if (call.exchange) call.exchange.add_up({});  // the other ranks wait for this one
    return false;
  }
  const StepEnd end(devices);
  devices[0].control = call.control;

  std::vector<at::Tensor> kept;
  std::vector<StepParams> steps;
  for (DeviceTensors& tensors : devices) {
    load_dense_params(tensors);
    steps.push_back(make_params(tensors, steps.empty(), call, kept));
  }
  if (devices.size() > 1 && devices[0].step_ring.defined()) {
    // The update writes the step's row, which holds the norm over all devices: measure it first.
    for (StepParams& params : steps) params.options.measure = true;
  }
  const bool gathers = steps.size() > 1 && kind_of(call) == LimitKind::kPerTensor;
  const at::Tensor before = gathers ? call.limit->state.clone() : at::Tensor();
  launch_step(rule, devices, steps, keep_alive, call.exchange);
  if (gathers) gather_limit_states(devices, call.limit->state, before);
  const bool changed = !is_known_skip(devices);
  for (DeviceTensors& tensors : devices) store_dense_params(tensors, changed);
  return changed;
}

}  // namespace fusedopt
