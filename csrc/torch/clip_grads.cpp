#include "torch/clip_grads.h"

#include <ATen/ExpandUtils.h>
#include <c10/core/GradMode.h>
#include <c10/util/hash.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <cstddef>
#include <unordered_set>

#include "torch/cuda_stream.h"
#include "torch/launch.h"
#include "torch/param_groups.h"

namespace fusedopt {

namespace {

bool runs_on(c10::Device device, const std::string& backend) {
  if (backend == "cuda") return built_with_cuda() && device.type() == cuda_device_type();
  return device.is_cpu() || (backend.empty() && built_with_cuda() && device.is_cuda());
}

// Anything else is for Python to refuse by name.
bool is_ordinary(const at::Tensor& grad) {
  const c10::TensorImpl* impl = grad.unsafeGetTensorImpl();
  return grad.layout() == at::kStrided && !impl->is_python_dispatch() &&
         has_kernels(grad.scalar_type()) && impl->has_storage() &&
         (impl->numel() == 0 || impl->storage().nbytes() > 0);
}

std::optional<std::vector<at::Tensor>> gather(const py::list& tensors, bool of_params,
                                              const std::string& backend) {
  std::vector<at::Tensor> grads;
  grads.reserve(tensors.size());
  for (const py::handle& item : tensors) {
    if (!THPVariable_Check(item.ptr())) return std::nullopt;
    const at::Tensor& tensor = THPVariable_Unpack(item.ptr());
    const at::Tensor& grad = of_params ? tensor.grad() : tensor;
    if (!grad.defined()) continue;
    if (!runs_on(grad.device(), backend) || !is_ordinary(grad)) return std::nullopt;
    grads.push_back(grad);
  }
  return grads;
}

bool is_dense(const at::Tensor& grad) {
  return grad.is_non_overlapping_and_dense() && !grad.is_neg();
}

// A gradient that the kernels can't write to where it lies, and the copy that they see.
struct DenseGrad {
  at::Tensor grad, dense;
};

// Sorts gradients into one partition per device.
class Collector {
 public:
  explicit Collector(bool writes) : writes_(writes) {}

  void add(const at::Tensor& grad) {
    DeviceTensors& device_tensors = devices_[device_tensors_for(grad, devices_)];
    void* data = writes_ ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr());
    const bool is_new = !writes_ || grad.numel() == 0 || seen_.emplace(data, grad.numel()).second;
    if (!is_new || !is_dense(grad)) {
      at::Tensor dense = at::empty_strided(
          grad.sizes(), at::infer_dense_strides(grad.sizes(), grad.strides()), grad.options());
      dense.copy_(grad.detach());
      data = dense.mutable_data_ptr();
      device_tensors.dense_grads.push_back(dense);
      if (writes_ && is_new) dense_grads_.push_back({grad, std::move(dense)});
    } else if (writes_ && !grad.is_inference()) {
      grad.unsafeGetTensorImpl()->bump_version();  // autograd learns of it
    }
    TensorInfo info{};
    info.numel = grad.numel();
    info.row_size = std::max<int64_t>(1, grad.numel());
    info.param = info.grad = to_storage(grad.scalar_type());
    for (Storage& state : info.states) state = info.param;
    TensorPointers pointers{};
    pointers.param = data;
    device_tensors.add(info, pointers);
  }

  std::vector<DeviceTensors>& begin(const RuleInfo& rule, const std::string& backend) {
    for (DeviceTensors& tensors : devices_) {
      tensors.begin(rule, 1, backend == "cuda" || tensors.device.is_cuda());
      for (size_t i = 0; i < tensors.pointers.size(); ++i) {
        tensors.grads[i] = tensors.pointers[i].param;
      }
    }
    return devices_;
  }

  void store_dense_grads() const {
    for (const DenseGrad& it : dense_grads_) it.grad.detach().copy_(it.dense);
  }

 private:
  const bool writes_;
  std::vector<DeviceTensors> devices_;
  std::vector<DenseGrad> dense_grads_;
  using Place = std::pair<const void*, int64_t>;
  std::unordered_set<Place, c10::hash<Place>> seen_;
};

void set_norm(const DeviceTensors& device_tensors,
              const std::variant<at::Tensor, double>& total_norm) {
  const at::Tensor slot = control_slot(device_tensors, offsetof(StepControl, sum_of_squares));
  const at::Tensor* tensor = std::get_if<at::Tensor>(&total_norm);
  if (tensor == nullptr) {
    slot.fill_(std::get<double>(total_norm));
  } else if (tensor->is_cpu()) {
    slot.fill_(tensor->item<double>());  // a copy to a device would wait for it
  } else {
    slot.copy_(tensor->detach().reshape({1}));
  }
}

}  // namespace

std::optional<ClipResult> clip_grads(const py::list& tensors, bool of_params, bool checked,
                                     const std::string& backend, const ClipCall& call) {
  const c10::NoGradGuard no_grad;
  const bool writes = call.max_norm != HUGE_VAL;
  const auto grads = gather(tensors, of_params, backend);
  if (!grads.has_value()) return std::nullopt;
  if (grads->empty()) return ClipResult{};
  bool wide = false;
  for (const at::Tensor& grad : *grads) {
    if (writes && !checked && !is_dense(grad)) return std::nullopt;
    wide = wide || grad.scalar_type() == at::kDouble;
  }

  Collector collector(writes);
  for (const at::Tensor& grad : *grads) collector.add(grad);
  static const RuleInfo& rule = find_rule("scale");
  std::vector<DeviceTensors>& devices = collector.begin(rule, backend);
  std::vector<StepParams> steps;
  for (DeviceTensors& tensors : devices) {
    if (call.total_norm.has_value()) set_norm(tensors, *call.total_norm);
    StepParams step = tensors.step_params(SegmentKind::kNone);
    step.options.max_grad_norm = call.max_norm;
    step.options.skip_nonfinite = call.skip_nonfinite;
    step.options.measure = true;
    step.options.only_scales = true;
    const bool squares = !call.total_norm.has_value() && call.norm_type == 2;
    step.options.norm_type = squares ? NormType::kL2 : NormType::kInf;
    steps.push_back(step);
  }
  const auto keep_alive = [&] {
    std::vector<c10::Storage> memory;
    for (const at::Tensor& grad : *grads) memory.push_back(grad.storage());
    return memory;
  };
  const auto launch = call.total_norm.has_value() ? launch_update : launch_step;
  launch(rule, devices, steps, keep_alive);
  collector.store_dense_grads();
  return ClipResult{control_slot(devices[0], offsetof(StepControl, grad_norm)).squeeze(), wide};
}

}  // namespace fusedopt
