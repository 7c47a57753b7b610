#include "torch/clip_grads.h"

#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <stdexcept>

#include "torch/aten.h"
#include "torch/cuda_stream.h"
#include "torch/launch.h"
#include "torch/memory_overlap.h"
#include "torch/no_python.h"
#include "torch/param_groups.h"
#include "torch/size_lock.h"
#include "torch/tensor_guard.h"

namespace fusedopt {

namespace {

bool runs_on(c10::Device device, const std::string& backend) {
  if (backend == "cuda") return built_with_cuda() && device.type() == cuda_device_type();
  return device.is_cpu() || (backend.empty() && built_with_cuda() && device.is_cuda());
}

// Whether the kernels can read the gradient. Python refuses all others by name.
bool is_ordinary(const at::Tensor& grad) {
  const c10::TensorImpl* impl = grad.unsafeGetTensorImpl();
  return is_plain(impl) && has_kernels(grad.scalar_type()) && fits_its_storage(impl);
}

std::optional<std::vector<at::Tensor>> gather(const py::list& tensors, bool of_params,
                                              const std::string& backend) {
  std::vector<at::Tensor> grads;
  grads.reserve(tensors.size());
  for (const py::handle& item : tensors) {
    if (!is_tensor(item.ptr())) return std::nullopt;
    const at::Tensor& tensor = unpack(item.ptr());
    const at::Tensor& grad = of_params ? tensor.unsafeGetTensorImpl()->grad() : tensor;
    if (!grad.defined()) continue;
    if (!is_ordinary(grad) || !runs_on(grad.device(), backend)) return std::nullopt;
    grads.push_back(grad);
  }
  return grads;
}

// For every gradient, whether an earlier one consists of the same elements. Returns nothing if two
// gradients share only a part of their elements.
std::optional<std::vector<bool>> find_repeated(const std::vector<at::Tensor>& grads) {
  std::vector<MemoryRegion> regions;
  for (size_t i = 0; i < grads.size(); ++i) {
    regions.push_back(MemoryRegion::of(grads[i].unsafeGetTensorImpl(), grads[i].sizes(),
                                       grads[i].strides(), static_cast<int>(i)));
  }
  std::vector<bool> repeated(grads.size());
  std::vector<MemoryRegion> sorted = regions;
  for (const auto& [earlier, later] : overlapping_pairs(sorted)) {
    if (!have_the_same_elements(regions[earlier], regions[later])) return std::nullopt;
    repeated[later] = true;
  }
  return repeated;
}

bool is_dense(const at::Tensor& grad) {
  return grad.is_non_overlapping_and_dense() && !grad.is_neg();
}

// A gradient that the kernels can't write to in place, and the dense copy that they write to.
struct DenseGrad {
  at::Tensor grad, dense;
};

// Sorts gradients by device.
class Collector {
 public:
  explicit Collector(bool writes) : writes_(writes) {}

  // `repeated`: the same elements were added before. They are measured again, but not scaled again.
  void add(const at::Tensor& grad, bool repeated) {
    DeviceTensors& device_tensors = devices_[device_tensors_for(grad, devices_)];
    const bool writes = writes_ && !repeated;
    void* data = writes ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr());
    if (repeated || !is_dense(grad)) {
      at::Tensor dense =
          new_strided(grad.sizes(), dense_strides_of(grad.sizes(), grad.strides()), grad.options());
      dense.copy_(grad.detach());
      data = dense.mutable_data_ptr();
      device_tensors.dense_grads.push_back(dense);
      if (writes) dense_grads_.push_back({grad, std::move(dense)});
    } else if (writes) {
      written_.push_back(grad);
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

  // Call it after the gradients are scaled. It copies the dense copies back, and tells autograd of
  // the change.
  void finish() const {
    if (is_known_skip(devices_)) return;
    for (const DenseGrad& it : dense_grads_) it.grad.detach().copy_(it.dense);
    for (const at::Tensor& grad : written_) {
      if (!grad.is_inference()) grad.unsafeGetTensorImpl()->bump_version();
    }
  }

 private:
  const bool writes_;
  std::vector<DeviceTensors> devices_;
  std::vector<DenseGrad> dense_grads_;
  std::vector<at::Tensor> written_;  // in place
};

using TotalNorm = std::optional<std::variant<at::Tensor, double>>;

// Reads the norm into a number, unless that would wait for a device. May run Python code, as the
// tensor may be a subclass.
TotalNorm read_norm(const TotalNorm& total_norm) {
  if (!total_norm.has_value() || !std::holds_alternative<at::Tensor>(*total_norm)) {
    return total_norm;
  }
  const at::Tensor& tensor = std::get<at::Tensor>(*total_norm);
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (is_plain(impl) && !fits_its_storage(impl)) {
    throw std::runtime_error("total_norm has a storage that was freed; expected one number");
  }
  if (tensor.is_cpu() || !is_plain(impl)) return tensor.item<double>();
  return total_norm;
}

void set_norm(const DeviceTensors& device_tensors, const TotalNorm& total_norm) {
  const at::Tensor slot = control_slot(device_tensors, offsetof(StepControl, sum_of_squares));
  if (const at::Tensor* tensor = std::get_if<at::Tensor>(&*total_norm)) {
    slot.copy_(tensor->detach().reshape({1}));
  } else {
    slot.fill_(std::get<double>(*total_norm));
  }
}

}  // namespace

std::optional<ClipResult> clip_grads(const py::list& tensors, bool of_params, bool checked,
                                     const std::string& backend, const ClipCall& call) {
  const c10::NoGradGuard no_grad;
  const TotalNorm total_norm = read_norm(call.total_norm);
  const NoPythonDispatch no_python;
  const bool writes = call.max_norm != HUGE_VAL;
  const auto grads = gather(tensors, of_params, backend);
  if (!grads.has_value()) return std::nullopt;
  if (grads->empty()) return ClipResult{};
  bool wide = false;
  for (const at::Tensor& grad : *grads) {
    if (writes && !checked && !is_dense(grad)) return std::nullopt;
    wide = wide || grad.scalar_type() == at::kDouble;
  }

  std::optional<std::vector<bool>> repeated(std::in_place, grads->size());
  if (writes) repeated = find_repeated(*grads);
  if (!repeated.has_value()) return std::nullopt;

  Collector collector(writes);
  for (size_t i = 0; i < grads->size(); ++i) collector.add((*grads)[i], (*repeated)[i]);
  static const RuleInfo& rule = find_rule("scale");
  std::vector<DeviceTensors>& devices = collector.begin(rule, backend);
  std::vector<StepParams> steps;
  for (DeviceTensors& tensors : devices) {
    if (total_norm.has_value()) set_norm(tensors, total_norm);
    StepParams step = tensors.step_params(SegmentKind::kNone);
    step.options.max_grad_norm = call.max_norm;
    step.options.skip_nonfinite = call.skip_nonfinite;
    step.options.measure = true;
    step.options.only_scales = true;
    const bool squares = !total_norm.has_value() && call.norm_type == 2;
    step.options.norm_type = squares ? NormType::kL2 : NormType::kInf;
    steps.push_back(step);
  }
  SizeLock lock;
  const auto keep_alive = [&] {
    std::vector<c10::Storage> memory;
    for (const at::Tensor& grad : *grads) memory.push_back(grad.storage());
    lock.take(memory);
    return memory;
  };
  if (total_norm.has_value()) {
    launch_update(rule, devices, steps, keep_alive);
  } else {
    launch_step(rule, devices, steps, keep_alive, {});
  }
  collector.finish();
  return ClipResult{control_slot(devices[0], offsetof(StepControl, grad_norm)).squeeze(), wide};
}

std::optional<std::pair<int, int>> first_overlap(const std::vector<at::Tensor>& grads) {
  std::vector<MemoryRegion> regions;
  for (size_t i = 0; i < grads.size(); ++i) {
    const c10::TensorImpl* impl = grads[i].unsafeGetTensorImpl();
    if (!grads[i].defined() || !is_plain(impl) || !fits_its_storage(impl)) continue;
    regions.push_back(
        MemoryRegion::of(impl, grads[i].sizes(), grads[i].strides(), static_cast<int>(i)));
  }
  for (const auto& pair : overlapping_pairs(regions)) {
    const auto region = [&](int owner) {
      return *std::find_if(regions.begin(), regions.end(),
                           [&](const MemoryRegion& it) { return it.owner == owner; });
    };
    if (!have_the_same_elements(region(pair.first), region(pair.second))) return pair;
  }
  return std::nullopt;
}

}  // namespace fusedopt
