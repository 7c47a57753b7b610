// Compares a plan with its tensors, at every step.
#include <exception>
#include <stdexcept>

#include "torch/aten.h"
#include "torch/dict_version.h"
#include "torch/plan.h"

namespace fusedopt {

namespace {

// How many tensors ahead to prefetch. That many are compared while one comes from memory.
constexpr size_t kAhead = 6;

constexpr c10::DispatchKeySet kSpecialViews({c10::DispatchKey::Negative,
                                             c10::DispatchKey::ZeroTensor});

// Whether the error comes from a bad value. Python's checks refuse such a value by name. Other
// errors, such as an interrupt, are passed on.
bool is_of_a_bad_value(const py::error_already_set& error) {
  if (error.matches(PyExc_RecursionError)) return false;
  for (PyObject* type : {PyExc_TypeError, PyExc_ValueError, PyExc_RuntimeError, PyExc_LookupError,
                         PyExc_OverflowError, PyExc_AttributeError}) {
    if (error.matches(type)) return true;
  }
  return false;
}

// Whether the gradient is all zeros and has no memory. Forward-mode autograd makes such gradients.
bool is_zero(const c10::TensorImpl* grad) {
  return grad->key_set().has(c10::DispatchKey::ZeroTensor);
}

// Whether this plan can take the gradient. If not, Python refuses the gradient by name, or makes a
// plan that can take it.
bool is_ordinary(const at::Tensor& grad, const PlanParam& plan_param) {
  const c10::TensorImpl* impl = grad.unsafeGetTensorImpl();
  const at::ScalarType dtype = grad.scalar_type();
  return (is_plain(impl) || is_zero(impl)) &&
         (dtype == plan_param.grad_dtype ||
          (has_kernels(dtype) &&
           grad_dtype_for(plan_param.dtype, dtype) == plan_param.grad_dtype)) &&
         impl->device() == plan_param.device && equal(impl->sizes(), plan_param.sizes);
}

// Whether the kernels can read the gradient in place.
bool is_direct(const PlanParam& plan_param, const c10::TensorImpl* grad) {
  return grad->dtype() == c10::scalarTypeToTypeMeta(plan_param.grad_dtype) &&
         !grad->key_set().has_any(kSpecialViews) &&
         same_layout(plan_param.sizes, grad->strides(), plan_param.dense_strides);
}

}  // namespace

bool Plan::read_groups(const py::object& param_groups) {
  try {
    groups_.read(param_groups);
    if (groups_.size() != listed_.size()) return false;
    for (DeviceTensors& device_tensors : devices_) {
      for (size_t g = 0; g < listed_.size(); ++g) {
        Group& group = *device_tensors.group(g);
        group = read_group(rule_, names_, groups_.group(g), device_tensors.device,
                           device_tensors.hyperparameters(g));
        if (group.states_used != states_used_[g]) return false;
        group.seed = formats_[g].seed;
      }
    }
  } catch (py::error_already_set& error) {
    if (!is_of_a_bad_value(error)) throw;
    return false;  // Python's checks say what is wrong
  } catch (const std::exception&) {
    return false;
  }
  return true;
}

bool Plan::refresh(const py::dict& state) {
  moved_ = false;
  for (DeviceTensors& device_tensors : devices_) device_tensors.dense_grads.clear();
  return same_lists() && find_grads() && same_state(state) && (!moved_ || after_moves()) &&
         conflict() == nullptr;
}

bool Plan::same_lists() const {
  if (groups_.size() != listed_.size()) return false;
  for (size_t g = 0; g < listed_.size(); ++g) {
    PyObject* const params = groups_.params(g);
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(params);
    if (count != static_cast<Py_ssize_t>(listed_[g].size())) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (PySequence_Fast_GET_ITEM(params, i) != params_[listed_[g][i]].guard.object) return false;
    }
  }
  return true;
}

// Parameters without a gradient are not compared.
bool Plan::find_grads() {
  stepped_.clear();
  for (size_t i = 0; i < params_.size(); ++i) {
    if (i + kAhead < params_.size()) {
      const PlanParam& next = params_[i + kAhead];
      next.guard.prefetch();
      __builtin_prefetch(next.autograd_meta);
      prefetch(next.grad_impl);
      __builtin_prefetch(next.grad_storage);
    }
    PlanParam& plan_param = params_[i];
    if (!is_tensor(plan_param.guard.object)) return false;
    *plan_param.grad = nullptr;
    const at::Tensor& grad = grad_of(plan_param);
    if (!grad.defined()) continue;
    if (!plan_param.complete) return false;
    if (!same_param(plan_param) && !move_param(plan_param)) return false;
    if (!gather_grad(plan_param, grad)) return false;
    stepped_.push_back(plan_param.guard.impl);
  }
  return true;
}

bool Plan::same_param(const PlanParam& plan_param) const {
  const TensorGuard& guard = plan_param.guard;
  return guard.is_unchanged() && has_layout(guard.impl, plan_param.sizes, plan_param.strides);
}

// Takes over a parameter that has moved. Returns false if anything else about it has changed.
bool Plan::move_param(PlanParam& plan_param) {
  const at::Tensor& param = unpack(plan_param.guard.object);
  const c10::TensorImpl* impl = param.unsafeGetTensorImpl();
  const bool fits = is_plain(impl) && impl->key_set().raw_repr() == plan_param.guard.keys &&
                    param.scalar_type() == plan_param.dtype &&
                    impl->device() == plan_param.device &&
                    has_layout(impl, plan_param.sizes, plan_param.strides);
  if (!fits || !take_param(plan_param)) return false;
  moved_ = true;
  return true;
}

// Takes over the parameter's address. A copy-on-write parameter gets memory of its own first.
bool Plan::take_param(PlanParam& plan_param) {
  const at::Tensor& param = unpack(plan_param.guard.object);
  if (!fits_its_storage(param.unsafeGetTensorImpl())) return false;
  void* const data = param.mutable_data_ptr();
  plan_param.guard = TensorGuard::of(plan_param.guard.object);
  plan_param.autograd_meta = plan_param.guard.impl->autograd_meta();
  if (plan_param.written >= 0) written_[plan_param.written].region = region_of(plan_param);
  DeviceTensors& device_tensors = devices_[plan_param.device_tensors];
  for (DenseParam& it : device_tensors.dense_params) {
    if (it.index != plan_param.index) continue;
    it.param = plan_param.guard.impl;
    return true;
  }
  pointers_of(plan_param).param = data;
  return true;
}

// Points the kernels to a parameter's gradient, or to a dense copy of it.
bool Plan::gather_grad(PlanParam& plan_param, const at::Tensor& grad) {
  const c10::TensorImpl* const impl = grad.unsafeGetTensorImpl();
  const c10::StorageImpl* const storage = impl->unsafe_storage().unsafeGetStorageImpl();
  plan_param.grad_impl = impl;
  plan_param.grad_storage = storage;
  if (!is_ordinary(grad, plan_param)) return false;
  static const char kEmpty = 0;  // any address but null: there is a gradient
  if (plan_param.grad_bytes == 0) {
    *plan_param.grad = &kEmpty;
    return true;
  }
  if (is_direct(plan_param, impl)) {
    const char* const base = static_cast<const char*>(storage->data());
    const char* const data = base + impl->storage_offset() * impl->itemsize();
    if (base == nullptr || data + plan_param.grad_bytes > base + storage->nbytes()) return false;
    if (data == plan_param.known_grad || is_apart(plan_param, data)) {
      *plan_param.grad = data;
      return true;
    }
  } else if (!is_zero(impl) && !fits_its_storage(impl)) {
    return false;
  }
  at::Tensor dense = new_strided(plan_param.sizes, plan_param.dense_strides,
                                 grad.options().dtype(plan_param.grad_dtype));
  dense.copy_(grad.detach().resolve_neg());  // copy_ gets lazy negation wrong between some dtypes
  *plan_param.grad = dense.const_data_ptr();
  devices_[plan_param.device_tensors].dense_grads.push_back(std::move(dense));
  return true;
}

// Whether the gradient shares no memory with tensors that a step writes. If it does, the step reads
// a copy.
bool Plan::is_apart(PlanParam& plan_param, const void* grad) const {
  if (covered_.touches(grad, plan_param.grad_bytes)) return false;
  plan_param.known_grad = grad;
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
      prefetch_version(next.value);
      for (int i = next.first_item; i < next.last_item; ++i) items_[i].guard.prefetch();
    }
    StateEntry& entry = state_entries_[e];
    if (entry.first_item == entry.last_item) continue;
    const PlanParam& plan_param = params_[entry.param];
    if (*plan_param.grad == nullptr) continue;
    if (!is_of_version(entry.value, entry.version)) {
      if (!same_items(entry)) return false;
      entry.version = version_of(entry.value);
    }
    for (int i = entry.first_item; i < entry.last_item; ++i) {
      StateItem& item = items_[i];
      if (item.guard.object == nullptr) continue;
      if (item.guard.is_unchanged() && item.fits(item.guard.impl, plan_param)) continue;
      if (!move_item(item, item.guard.object, plan_param)) return false;
    }
  }
  return true;
}

// It walks the dicts in order and hashes nothing: Tensor.__hash__ would call Python.
bool Plan::same_entries(const py::dict& state) const {
  if (PyDict_Size(state.ptr()) != static_cast<Py_ssize_t>(state_entries_.size())) return false;
  PyObject *key, *value;
  Py_ssize_t at = 0;
  for (const StateEntry& entry : state_entries_) {
    if (!PyDict_Next(state.ptr(), &at, &key, &value)) return false;
    if (key != entry.key || value != entry.value) return false;
    if (entry.first_item != entry.last_item && !PyDict_Check(value)) return false;
  }
  return true;
}

// Takes over tensors that have replaced others.
bool Plan::same_items(const StateEntry& entry) {
  if (!PyDict_Check(entry.value)) return false;
  if (PyDict_Size(entry.value) != entry.last_item - entry.first_item) return false;
  PyObject *name, *value;
  Py_ssize_t at = 0;
  for (int i = entry.first_item; i < entry.last_item; ++i) {
    StateItem& item = items_[i];
    if (!PyDict_Next(entry.value, &at, &name, &value) || name != item.key) return false;
    if (item.guard.object == nullptr) continue;
    if (!is_tensor(value)) return false;
    if (value != item.guard.object && !move_item(item, value, params_[entry.param])) return false;
  }
  return true;
}

// Takes over an item of a state that is another tensor now, or has moved. Returns false if anything
// else about it has changed.
bool Plan::move_item(StateItem& item, PyObject* value, const PlanParam& plan_param) {
  if (!item.takes(value, plan_param)) return false;
  if (unpack(value).dtype() != item.guard.dtype) return false;
  use_item(plan_param, item, value);
  moved_ = true;
  return true;
}

void Plan::use_item(const PlanParam& plan_param, StateItem& item, PyObject* value) {
  TensorPointers& pointers = pointers_of(plan_param);
  void* const data = unpack(value).mutable_data_ptr();
  item.guard = TensorGuard::of(value);
  switch (item.kind) {
    case StateItem::Kind::kScalar:
      pointers.scalars[item.index] = static_cast<float*>(data);
      break;
    case StateItem::Kind::kState:
    case StateItem::Kind::kCodes:
      pointers.states[item.index] = data;
      break;
    case StateItem::Kind::kRest:
      pointers.rest = data;
      break;
    case StateItem::Kind::kScales:
      pointers.scales[item.index] = static_cast<float*>(data);
      break;
  }
  if (item.written >= 0) written_[item.written].region = item.region(plan_param);
}

// Call it after pointers have changed. The tensors may now share memory with each other, or with
// gradients that shared none before.
bool Plan::after_moves() {
  find_shared_memory();
  for (DeviceTensors& device_tensors : devices_) {
    device_tensors.dense_grads.clear();
    if (!device_tensors.renew_tables()) return false;
  }
  for (PlanParam& plan_param : params_) {
    if (*plan_param.grad != nullptr && !gather_grad(plan_param, grad_of(plan_param))) return false;
  }
  return true;
}

// Two tensors that share memory and that this step would both write.
const std::pair<int, int>* Plan::conflict() const {
  const auto has_grad = [](const PlanParam& it) { return grad_of(it).defined(); };
  for (const std::pair<int, int>& pair : conflicts_) {
    if (has_grad(params_[written_[pair.first].param]) &&
        has_grad(params_[written_[pair.second].param])) {
      return &pair;
    }
  }
  return nullptr;
}

void Plan::bump_versions() const {
  for (c10::TensorImpl* param : stepped_) {
    if (param->version_counter().enabled())
      param->bump_version();  // tensors of inference mode have no version
  }
}

std::vector<c10::Storage> Plan::keep_alive() const {
  std::vector<c10::Storage> result;
  result.reserve(2 * params_.size() + items_.size());
  for (const PlanParam& plan_param : params_) {
    if (*plan_param.grad == nullptr) continue;
    result.push_back(plan_param.guard.impl->storage());
    result.push_back(grad_of(plan_param).storage());
  }
  for (const StateEntry& entry : state_entries_) {
    if (entry.param < 0 || *params_[entry.param].grad == nullptr) continue;
    for (int i = entry.first_item; i < entry.last_item; ++i) {
      const StateItem& item = items_[i];
      if (item.guard.object != nullptr) result.push_back(item.guard.impl->storage());
    }
  }
  return result;
}

Plan::Use::Use(Plan& plan) : plan_(plan) {
  if (plan.in_use_) {
    throw std::runtime_error(
        "another step of this optimizer is running: was step() called from within it, or from "
        "another thread?");
  }
  plan.in_use_ = true;
}

Plan::Use::~Use() {
  for (DeviceTensors& device_tensors : plan_.devices_) device_tensors.dense_grads.clear();
  plan_.groups_.clear();
  plan_.in_use_ = false;
}

}  // namespace fusedopt
