#include "torch/plan.h"

#include <ATen/ExpandUtils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <exception>
#include <unordered_map>

#include "torch/param_groups.h"

namespace fusedopt {

namespace {

const at::Tensor& unpack(PyObject* object) { return THPVariable_Unpack(object); }

PyObject* find(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Another number whenever a dict's contents change, unlike any other dict's. 0: Python keeps none.
uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030E0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

// Whether a dict's contents are those of that version, for certain.
bool is_of_version(PyObject* dict, uint64_t version) {
  return version != 0 && version_of(dict) == version;
}

// Strides of dimensions of size 1 say nothing about the layout.
bool same_layout(c10::IntArrayRef sizes, c10::IntArrayRef a, c10::IntArrayRef b) {
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1 && a[i] != b[i]) return false;
  }
  return true;
}

// The gradient's dtype as the kernels read it: the parameter's own, or the one it is computed in.
at::ScalarType grad_dtype_for(at::ScalarType param, at::ScalarType grad) {
  if (grad == param) return param;
  return param == at::kDouble ? at::kDouble : at::kFloat;
}

// Anything else is for Python to refuse by name, or for a plan that knows it.
bool is_ordinary(const at::Tensor& grad, const PlanParam& plan_param) {
  const at::ScalarType dtype = grad.scalar_type();
  return (dtype == plan_param.grad_dtype ||
          (has_kernels(dtype) &&
           grad_dtype_for(plan_param.dtype, dtype) == plan_param.grad_dtype)) &&
         grad.layout() == at::kStrided && grad.device() == plan_param.device &&
         equal(grad.unsafeGetTensorImpl()->sizes(), plan_param.sizes);
}

// How many tensors ahead to prefetch: as many as are looked at while one comes from memory.
constexpr size_t kAhead = 6;

}  // namespace

bool StateItem::laid_out_as(const PlanParam* plan_param) const {
  if (guard.impl->storage_offset() != storage_offset || guard.impl->dtype() != dtype) return false;
  if (!is_tensor) return true;
  return equal(guard.impl->sizes(), plan_param->sizes) &&
         equal(guard.impl->strides(), plan_param->dense_strides);
}

Plan::Plan(const std::string& rule, const std::string& backend, const py::list& param_groups,
           const py::dict& state, const py::dict& counters, const std::vector<at::Tensor>& rings)
    : rule_(find_rule(rule)) {
  for (const OptionInfo& it : rule_.options) {
    names_.push_back(PyUnicode_InternFromString(it.name.c_str()));
  }
  std::vector<double> values(rule_.num_hyperparameters);
  std::unordered_map<PyObject*, int> known;
  for (const py::handle& group : param_groups) {
    const uint32_t index = static_cast<uint32_t>(listed_.size());
    const py::list params(group["params"]);
    const c10::Device device = params.empty() ? at::kCPU : unpack(params[0].ptr()).device();
    const Group read = read_group(rule_, names_, group.ptr(), device, values.data());
    states_used_.push_back(read.states_used);
    listed_.emplace_back();
    for (const py::handle& param : params) {
      const auto [found, is_new] = known.try_emplace(param.ptr(), params_.size());
      listed_.back().push_back(found->second);
      if (is_new) add_param(param.ptr(), index);  // else listed before: updated once
    }
  }
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
    const int first_item = static_cast<int>(items_.size());
    const auto found = known.find(key);
    if (found != known.end()) add_state(params_[found->second], value);
    const PlanParam* plan_param = found == known.end() ? nullptr : &params_[found->second];
    state_entries_.push_back(
        {key, value, 0, plan_param, first_item, static_cast<int>(items_.size())});
  }
  for (PlanParam& plan_param : params_) {
    PyObject* counter = find(counters.ptr(), plan_param.guard.object);
    if (counter != nullptr) add_counter(plan_param, counter);
    const int states = __builtin_popcount(states_used_[plan_param.group]);
    plan_param.complete = plan_param.items == static_cast<int>(rule_.scalars.size()) + states;
  }
  for (size_t i = 0; i < devices_.size(); ++i) {
    DeviceTensors& device_tensors = devices_[i];
    if (!rings.empty()) device_tensors.param_ring = rings.at(1 + i);
    if (i == 0 && !rings.empty()) device_tensors.step_ring = rings[0];
    const bool on_cuda = backend == "cuda" || device_tensors.device.is_cuda();
    device_tensors.begin(rule_, listed_.size(), on_cuda);
  }
}

void Plan::add_param(PyObject* object, uint32_t group) {
  const at::Tensor& param = unpack(object);
  const at::ScalarType dtype = param.scalar_type();
  PlanParam plan_param;
  plan_param.guard = TensorGuard::of(object);
  plan_param.autograd_meta = plan_param.guard.impl->autograd_meta();
  plan_param.group = group;
  plan_param.device = param.device();
  plan_param.dtype = dtype;
  const at::Tensor& grad = param.grad();
  plan_param.grad_dtype = grad_dtype_for(dtype, grad.defined() ? grad.scalar_type() : dtype);
  plan_param.storage_offset = param.storage_offset();
  plan_param.sizes = param.sizes();
  plan_param.strides = plan_param.dense_strides = param.strides();
  if (!param.is_non_overlapping_and_dense()) {
    plan_param.dense_strides = at::infer_dense_strides(param.sizes(), param.strides());
  }
  plan_param.device_tensors = static_cast<int>(device_tensors_for(param, devices_));
  DeviceTensors& device_tensors = devices_[plan_param.device_tensors];
  TensorInfo info{};
  info.numel = param.numel();
  const int64_t rows = param.dim() > 1 ? std::max<int64_t>(1, param.size(0)) : 1;
  info.row_size = std::max<int64_t>(1, param.numel() / rows);
  info.group = group;
  info.number = static_cast<uint32_t>(params_.size());
  info.param = to_storage(dtype);
  info.grad = to_storage(plan_param.grad_dtype);
  for (Storage& state : info.states) state = info.param;
  TensorPointers pointers{};
  pointers.param = param.data_ptr();
  if (!same_layout(param.sizes(), param.strides(), plan_param.dense_strides) || param.is_neg()) {
    at::Tensor dense = at::empty_strided(param.sizes(), plan_param.dense_strides, param.options());
    pointers.param = dense.data_ptr();
    const int index = static_cast<int>(device_tensors.infos.size());
    device_tensors.dense_params.push_back({param.unsafeGetTensorImpl(), index, dense, {}});
  }
  plan_param.index = device_tensors.add(info, pointers);
  params_.push_back(std::move(plan_param));
}

void Plan::add_state(PlanParam& plan_param, PyObject* state) {
  DeviceTensors& device_tensors = devices_[plan_param.device_tensors];
  TensorInfo& info = device_tensors.infos[plan_param.index];
  TensorPointers& pointers = device_tensors.pointers[plan_param.index];
  const uint32_t states_used = states_used_[plan_param.group];
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) {
    items_.push_back({key, {}, 0, {}, false});
    const std::string name = py::cast<std::string>(py::str(py::handle(key)));
    const auto use = [&] {
      items_.back().guard = TensorGuard::of(value);
      items_.back().storage_offset = unpack(value).storage_offset();
      items_.back().dtype = unpack(value).dtype();
      ++plan_param.items;
      return unpack(value).data_ptr();
    };
    for (size_t k = 0; k < rule_.scalars.size(); ++k) {
      if (name == rule_.scalars[k].name) pointers.scalars[k] = static_cast<float*>(use());
    }
    for (size_t k = 0; k < rule_.states.size(); ++k) {
      if (name != rule_.states[k].name || (states_used >> k & 1) == 0) continue;
      pointers.states[k] = use();
      items_.back().is_tensor = true;
      info.states[k] = to_storage(unpack(value).scalar_type());
    }
  }
}

// It is the first of the rule's scalars. Nobody else has it, so that it stays where it is.
void Plan::add_counter(PlanParam& plan_param, PyObject* counter) {
  TensorPointers& pointers = devices_[plan_param.device_tensors].pointers[plan_param.index];
  pointers.scalars[0] = static_cast<float*>(unpack(counter).data_ptr());
  ++plan_param.items;
}

bool Plan::refresh(const py::list& param_groups, const py::dict& state) {
  if (!same_lists(param_groups) || !same_state(state) || !same_groups(param_groups)) return false;
  for (DeviceTensors& device_tensors : devices_) device_tensors.dense_grads.clear();
  for (size_t i = 0; i < params_.size(); ++i) {
    if (i + kAhead < params_.size()) {
      params_[i + kAhead].guard.prefetch();
      __builtin_prefetch(params_[i + kAhead].autograd_meta);
      params_[i + kAhead].grad_guard.prefetch();
    }
    if (!same_param(params_[i]) || !gather_grad(params_[i])) return false;
  }
  return true;
}

bool Plan::same_lists(const py::list& param_groups) const {
  static PyObject* const kParams = PyUnicode_InternFromString("params");
  if (param_groups.size() != listed_.size()) return false;
  for (size_t g = 0; g < listed_.size(); ++g) {
    PyObject* params = find(PyList_GET_ITEM(param_groups.ptr(), g), kParams);
    if (params == nullptr || !(PyList_Check(params) || PyTuple_Check(params))) return false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(params);
    if (count != static_cast<Py_ssize_t>(listed_[g].size())) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (PySequence_Fast_GET_ITEM(params, i) != params_[listed_[g][i]].guard.object) return false;
    }
  }
  return true;
}

bool Plan::same_state(const py::dict& state) {
  if (!is_of_version(state.ptr(), state_version_)) {
    if (!same_entries(state)) return false;
    state_version_ = version_of(state.ptr());
  }
  for (size_t e = 0; e < state_entries_.size(); ++e) {
    if (e + kAhead < state_entries_.size()) {
      const StateEntry& next = state_entries_[e + kAhead];
      __builtin_prefetch(next.value);
      for (int i = next.first_item; i < next.last_item; ++i) items_[i].guard.prefetch();
    }
    StateEntry& entry = state_entries_[e];
    if (entry.first_item == entry.last_item) continue;
    if (!is_of_version(entry.value, entry.version)) {
      if (!same_items(entry)) return false;
      entry.version = version_of(entry.value);
    }
    for (int i = entry.first_item; i < entry.last_item; ++i) {
      const StateItem& item = items_[i];
      if (item.guard.object == nullptr) continue;
      if (!item.guard.is_unchanged() || !item.laid_out_as(entry.plan_param)) return false;
    }
  }
  return true;
}

// Walking the dicts in their order spares hashing: Tensor.__hash__ is a call into Python.
bool Plan::same_entries(const py::dict& state) const {
  if (PyDict_Size(state.ptr()) != static_cast<Py_ssize_t>(state_entries_.size())) return false;
  PyObject *key, *value;
  Py_ssize_t at = 0;
  for (const StateEntry& entry : state_entries_) {
    if (!PyDict_Next(state.ptr(), &at, &key, &value)) return false;
    if (key != entry.key || value != entry.value) return false;
  }
  return true;
}

bool Plan::same_items(const StateEntry& entry) const {
  if (!PyDict_Check(entry.value)) return false;
  if (PyDict_Size(entry.value) != entry.last_item - entry.first_item) return false;
  PyObject *name, *tensor;
  Py_ssize_t at = 0;
  for (int i = entry.first_item; i < entry.last_item; ++i) {
    if (!PyDict_Next(entry.value, &at, &name, &tensor) || name != items_[i].key) return false;
    if (items_[i].guard.object != nullptr && !items_[i].guard.is_of(tensor)) return false;
  }
  return true;
}

bool Plan::same_groups(const py::list& param_groups) {
  for (DeviceTensors& device_tensors : devices_) {
    for (size_t g = 0; g < listed_.size(); ++g) {
      PyObject* group = PyList_GET_ITEM(param_groups.ptr(), g);
      try {
        *device_tensors.group(g) = read_group(rule_, names_, group, device_tensors.device,
                                              device_tensors.hyperparameters(g));
      } catch (const std::exception&) {
        return false;  // Python says what is wrong with it, and where
      }
      if (device_tensors.group(g)->states_used != states_used_[g]) return false;
    }
  }
  return true;
}

bool Plan::same_param(const PlanParam& plan_param) const {
  if (!plan_param.guard.is_of(plan_param.guard.object) || !plan_param.guard.is_unchanged())
    return false;
  const c10::TensorImpl* impl = plan_param.guard.impl;
  return equal(impl->sizes(), plan_param.sizes) && equal(impl->strides(), plan_param.strides) &&
         impl->storage_offset() == plan_param.storage_offset &&
         impl->dtype() == c10::scalarTypeToTypeMeta(plan_param.dtype);
}

// Finds a parameter's gradient, if it has one, as the kernels are to see it.
bool Plan::gather_grad(PlanParam& plan_param) {
  DeviceTensors& device_tensors = devices_[plan_param.device_tensors];
  const int64_t numel = device_tensors.infos[plan_param.index].numel;
  const at::Tensor& param = unpack(plan_param.guard.object);
  const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
  const void*& slot = device_tensors.grads[plan_param.index];
  slot = nullptr;
  if (!grad.defined()) return true;
  plan_param.grad_guard.impl = grad.unsafeGetTensorImpl();
  plan_param.grad_guard.storage =
      plan_param.grad_guard.impl->unsafe_storage().unsafeGetStorageImpl();
  if (!plan_param.complete || !is_ordinary(grad, plan_param)) return false;
  // Autograd learns of the update as of any other in-place operation.
  if (!param.is_inference()) param.unsafeGetTensorImpl()->bump_version();
  const bool direct = grad.scalar_type() == plan_param.grad_dtype && !grad.is_neg() &&
                      same_layout(plan_param.sizes, plan_param.grad_guard.impl->strides(),
                                  plan_param.dense_strides);
  static const char kEmpty = 0;  // an empty gradient is one all the same
  if (direct) {
    slot = numel == 0 ? &kEmpty : grad.unsafeGetTensorImpl()->data();
    return slot != nullptr;
  }
  at::Tensor dense = at::empty_strided(grad.sizes(), plan_param.dense_strides,
                                       grad.options().dtype(plan_param.grad_dtype));
  dense.copy_(grad.detach());
  slot = numel == 0 ? &kEmpty : dense.data_ptr();
  device_tensors.dense_grads.push_back(std::move(dense));
  return true;
}

std::vector<c10::Storage> Plan::keep_alive() const {
  std::vector<c10::Storage> result;
  for (const PlanParam& plan_param : params_) {
    const at::Tensor& param = unpack(plan_param.guard.object);
    result.push_back(param.storage());
    if (param.grad().defined()) result.push_back(param.grad().storage());
  }
  for (const StateItem& item : items_) {
    if (item.guard.object != nullptr) result.push_back(unpack(item.guard.object).storage());
  }
  return result;
}

std::vector<std::pair<int, int>> Plan::nonfinite() const {
  std::vector<at::Tensor> sums;
  for (const DeviceTensors& device_tensors : devices_) {
    sums.push_back(device_tensors.chunk_sums().to(at::kCPU).contiguous());
  }
  std::vector<std::pair<int, int>> result;
  for (size_t g = 0; g < listed_.size(); ++g) {
    for (size_t i = 0; i < listed_[g].size(); ++i) {
      const PlanParam& plan_param = params_[listed_[g][i]];
      const DeviceTensors& device_tensors = devices_[plan_param.device_tensors];
      const TensorShape& shape = device_tensors.layout->shapes()[plan_param.index];
      const double* sum = sums[plan_param.device_tensors].data_ptr<double>();
      bool finite = true;
      for (int64_t c = 0; c < chunks_of(shape.numel); ++c) {
        finite = finite && std::isfinite(sum[shape.first_chunk + c]);
      }
      if (!finite) result.emplace_back(static_cast<int>(g), static_cast<int>(i));
    }
  }
  return result;
}

}  // namespace fusedopt
