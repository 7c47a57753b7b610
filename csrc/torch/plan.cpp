// Makes a plan. plan_refresh.cpp compares it with the tensors at every step.
#include "torch/plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <unordered_map>

#include "torch/aten.h"
#include "torch/cuda_stream.h"
#include "torch/no_python.h"

namespace fusedopt {

namespace {

// Names in a parameter's state.
constexpr const char* kRestName = "param_rest";
constexpr const char* kCodesSuffix = "_8bit";
constexpr const char* kScalesSuffix = "_scale";

bool runs_on_cuda(c10::Device device, const std::string& backend) {
  return built_with_cuda() && (device.is_cuda() || (backend == "cuda" && device.is_cpu() &&
                                                    device.type() == cuda_device_type()));
}

bool kernels_take(const at::Tensor& param, const std::string& backend) {
  return is_plain(param.unsafeGetTensorImpl()) && has_kernels(param.scalar_type()) &&
         (runs_on_cuda(param.device(), backend) || (param.is_cpu() && backend != "cuda"));
}

Storage param_storage(at::ScalarType dtype, const GroupFormat& format) {
  const bool in_24_bits = format.master_bits == 24;
  if (format.master_bits != 0 && dtype == at::kBFloat16) {
    return in_24_bits ? Storage::kBFloat16In24Bits : Storage::kBFloat16Exact;
  }
  if (format.master_bits != 0 && dtype == at::kHalf) {
    return in_24_bits ? Storage::kFloat16In24Bits : Storage::kFloat16Exact;
  }
  if (dtype == at::kBFloat16 && format.stochastic_param) return Storage::kBFloat16Stochastic;
  return to_storage(dtype);
}

Storage state_storage(at::ScalarType dtype, Coding coding, bool at_random) {
  switch (dtype) {
    case at::kChar:
    case at::kByte:
      if (coding == Coding::kLinear) return Storage::kLinear8;
      return at_random ? Storage::kRoot8Stochastic : Storage::kRoot8;
    case at::kBFloat16:
      return at_random ? Storage::kBFloat16Stochastic : Storage::kBFloat16;
    case at::kHalf:
      return at_random ? Storage::kFloat16Stochastic : Storage::kFloat16;
    default:
      return to_storage(dtype);
  }
}

// The device on which the kernels can read a group's lr from a tensor.
c10::Device device_of_group(PyObject* params) {
  if (PySequence_Fast_GET_SIZE(params) == 0) return at::kCPU;
  PyObject* const first = PySequence_Fast_GET_ITEM(params, 0);
  if (!is_tensor(first) || !is_plain(unpack(first).unsafeGetTensorImpl())) return at::kCPU;
  return unpack(first).device();
}

void check_ring(const at::Tensor& ring, c10::Device device, at::IntArrayRef columns) {
  const bool fits = ring.defined() && is_plain(ring.unsafeGetTensorImpl()) &&
                    ring.scalar_type() == at::kDouble && ring.is_contiguous() && ring.dim() > 0 &&
                    ring.size(0) > 0 && ring.sizes().slice(1) == columns &&
                    ring.device() == device && fits_its_storage(ring.unsafeGetTensorImpl());
  if (!fits) throw py::value_error("fusedopt: a telemetry ring is not one of these parameters'");
}

}  // namespace

Plan::Plan(const std::string& rule, const std::string& backend, const py::object& param_groups,
           const py::object& state, const py::dict& counters, const std::vector<at::Tensor>& rings,
           std::vector<GroupFormat> formats, std::vector<int64_t> first_elements)
    : rule_(find_rule(rule)),
      formats_(std::move(formats)),
      first_elements_(std::move(first_elements)) {
  for (const OptionInfo& it : rule_.options) {
    names_.push_back(PyUnicode_InternFromString(it.name.c_str()));
  }
  std::vector<double> values(rule_.num_hyperparameters);
  // Everything that may run Python code comes first. The lists are copied to tuples, as Python code
  // may change them.
  groups_.read(param_groups);
  std::vector<py::tuple> lists;
  for (size_t g = 0; g < groups_.size(); ++g) {
    lists.emplace_back(py::reinterpret_borrow<py::object>(groups_.params(g)));
    const c10::Device device = device_of_group(lists[g].ptr());
    const Group group = read_group(rule_, names_, groups_.group(g), device, values.data());
    states_used_.push_back(group.states_used);
  }
  groups_.clear();
  formats_.resize(lists.size());
  const py::object states = as_dict(state);
  const NoPythonDispatch no_python;

  std::unordered_map<PyObject*, int> known;
  for (size_t g = 0; g < lists.size(); ++g) {
    listed_.emplace_back();
    for (const py::handle& param : lists[g]) {
      if (!is_tensor(param.ptr())) throw py::type_error("fusedopt: a parameter is not a tensor");
      const auto [found, is_new] = known.try_emplace(param.ptr(), params_.size());
      listed_.back().push_back(found->second);
      // A parameter that is listed several times is updated once.
      if (is_new) add_param(param.ptr(), static_cast<uint32_t>(g), backend);
    }
  }
  for (PlanParam& plan_param : params_) {
    PyObject* counter = PyDict_GetItemWithError(counters.ptr(), plan_param.guard.object);
    if (counter == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (counter != nullptr) add_counter(plan_param, counter);
  }
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(states.ptr(), &at, &key, &value);) {
    const int first_item = static_cast<int>(items_.size());
    const auto found = known.find(key);
    const int param = found == known.end() ? -1 : found->second;
    if (param >= 0) {
      if (PyDict_Check(value)) add_state(params_[param], value);
      params_[param].odd_state = !PyDict_Check(value) && value != Py_None;
    }
    state_entries_.push_back({key, value, 0, param, first_item, static_cast<int>(items_.size())});
  }
  for (PlanParam& plan_param : params_) {
    plan_param.complete = plan_param.has_kernels && !plan_param.odd_state &&
                          plan_param.items == expected_items(plan_param);
    // If its memory is too small, the guard fits no storage, and the first gradient needs a new
    // plan.
    if (plan_param.complete && !take_param(plan_param)) plan_param.guard.storage = nullptr;
  }
  set_rings(rings);
  for (DeviceTensors& device_tensors : devices_) {
    device_tensors.begin(rule_, listed_.size(), runs_on_cuda(device_tensors.device, backend));
  }
  stepped_.reserve(params_.size());
  for (PlanParam& it : params_) {
    it.grad = it.device_tensors < 0 ? &no_grad_ : &devices_[it.device_tensors].grads[it.index];
  }
  find_written();
  find_shared_memory();
  if (const std::pair<int, int>* found = conflict()) {
    shared_ = {place_of(written_[found->first]), place_of(written_[found->second])};
  }
}

void Plan::set_rings(const std::vector<at::Tensor>& rings) {
  if (rings.empty()) return;
  constexpr int64_t kMeasures = sizeof(ParamRow) / sizeof(double);
  for (size_t i = 0; i < devices_.size(); ++i) {
    const c10::Device device = devices_[i].device;
    check_ring(rings.at(1 + i), device,
               {static_cast<int64_t>(devices_[i].infos.size()), kMeasures});
    devices_[i].param_ring = rings[1 + i];
    if (i > 0) continue;
    check_ring(rings[0], device, {kStepColumns + static_cast<int64_t>(listed_.size())});
    devices_[i].step_ring = rings[0];
  }
}

void Plan::add_param(PyObject* object, uint32_t group, const std::string& backend) {
  const at::Tensor& param = unpack(object);
  PlanParam plan_param;
  plan_param.guard.object = object;
  plan_param.group = group;
  plan_param.has_kernels = kernels_take(param, backend);
  // A parameter without kernels is not updated, but it has a number and a column in telemetry.
  const c10::Device device = param.device();
  if (device.is_cpu() || device.is_cuda()) add_entry(plan_param, param);
  params_.push_back(std::move(plan_param));
}

void Plan::add_entry(PlanParam& plan_param, const at::Tensor& param) {
  plan_param.device = param.device();
  plan_param.device_tensors = static_cast<int>(device_tensors_for(param, devices_));
  DeviceTensors& device_tensors = devices_[plan_param.device_tensors];
  TensorInfo info{};
  info.row_size = 1;
  info.group = plan_param.group;
  info.number = static_cast<uint32_t>(params_.size());
  if (info.number < first_elements_.size()) info.first_element = first_elements_[info.number];
  plan_param.index = device_tensors.add(info, {});
  if (plan_param.has_kernels) lay_out(plan_param, param);
}

void Plan::lay_out(PlanParam& plan_param, const at::Tensor& param) {
  DeviceTensors& device_tensors = devices_[plan_param.device_tensors];
  TensorInfo& info = info_of(plan_param);
  plan_param.guard = TensorGuard::of(plan_param.guard.object);
  plan_param.autograd_meta = plan_param.guard.impl->autograd_meta();
  plan_param.dtype = param.scalar_type();
  const at::Tensor& grad = plan_param.guard.impl->grad();
  plan_param.grad_dtype =
      grad_dtype_for(plan_param.dtype, grad.defined() ? grad.scalar_type() : plan_param.dtype);
  plan_param.sizes = param.sizes();
  plan_param.strides = plan_param.dense_strides = param.strides();
  if (!param.is_non_overlapping_and_dense()) {
    plan_param.dense_strides = dense_strides_of(param.sizes(), param.strides());
  }
  info.numel = param.numel();
  info.param = param_storage(plan_param.dtype, formats_[plan_param.group]);
  info.grad = to_storage(plan_param.grad_dtype);
  for (Storage& state : info.states) state = to_storage(plan_param.dtype);
  plan_param.grad_bytes = param.numel() * c10::elementSize(plan_param.grad_dtype);
  const int64_t rows = param.dim() > 1 ? std::max<int64_t>(1, param.size(0)) : 1;
  info.row_size = std::max<int64_t>(1, param.numel() / rows);
  if (!same_layout(param.sizes(), param.strides(), plan_param.dense_strides) || param.is_neg()) {
    at::Tensor dense = new_strided(param.sizes(), plan_param.dense_strides, param.options());
    pointers_of(plan_param).param = dense.data_ptr();
    device_tensors.dense_params.push_back({plan_param.guard.impl, plan_param.index, dense, {}});
  }
}

void Plan::add_state(PlanParam& plan_param, PyObject* state) {
  if (!plan_param.has_kernels) return;
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) {
    items_.push_back({key});
    StateItem& item = items_.back();
    const char* name = PyUnicode_Check(key) ? PyUnicode_AsUTF8(key) : nullptr;
    if (name == nullptr) {
      PyErr_Clear();  // not a name of the rule's
      continue;
    }
    name_item(plan_param, item, name, value);
  }
}

// Adds an item if its name is one of those that the rule and the group's formats have.
void Plan::name_item(PlanParam& plan_param, StateItem& item, const char* name, PyObject* value) {
  using Kind = StateItem::Kind;
  const auto add = [&](bool is_it, Kind kind, size_t index, at::ScalarType dtype) {
    if (!is_it) return;
    item.kind = kind;
    item.index = static_cast<int>(index);
    item.dtype = dtype;
    add_item(plan_param, item, value);
  };
  for (size_t k = 0; k < rule_.scalars.size(); ++k) {
    add(std::strcmp(name, rule_.scalars[k].name) == 0, Kind::kScalar, k, at::kFloat);
  }
  const bool in_blocks = formats_[plan_param.group].in_blocks;
  for (size_t k = 0; k < rule_.states.size(); ++k) {
    if ((states_used_[plan_param.group] >> k & 1) == 0) continue;
    const StateName& state = rule_.states[k];
    if (!in_blocks) {
      add(std::strcmp(name, state.name) == 0, Kind::kState, k, plan_param.dtype);
    } else if (state.coding != Coding::kNone) {
      const auto dtype = state.coding == Coding::kLinear ? at::kChar : at::kByte;
      add(name == std::string(state.name) + kCodesSuffix, Kind::kCodes, k, dtype);
      add(name == std::string(state.name) + kScalesSuffix, Kind::kScales, k, at::kFloat);
    }
  }
  const int rest = rest_bytes(info_of(plan_param).param);
  add(rest > 0 && std::strcmp(name, kRestName) == 0, Kind::kRest, 0,
      rest == 1 ? at::kChar : at::kShort);
}

// Ignores an item that no step can use, as if it did not exist.
void Plan::add_item(PlanParam& plan_param, StateItem& item, PyObject* value) {
  if (!item.takes(value, plan_param)) return;
  if (item.kind == StateItem::Kind::kState || item.kind == StateItem::Kind::kCodes) {
    const GroupFormat& format = formats_[plan_param.group];
    const bool at_random = (format.stochastic_states >> item.index & 1) != 0;
    const Storage storage =
        state_storage(unpack(value).scalar_type(), rule_.states[item.index].coding, at_random);
    TensorInfo& info = info_of(plan_param);
    if (!can_be_state(info.param, storage)) return;
    info.states[item.index] = storage;
  }
  use_item(plan_param, item, value);
  ++plan_param.items;
}

int Plan::expected_items(const PlanParam& plan_param) {
  const int states = __builtin_popcount(states_used_[plan_param.group]);
  const int arrays = formats_[plan_param.group].in_blocks ? 2 * states : states;
  const int rests = rest_bytes(info_of(plan_param).param) > 0 ? 1 : 0;
  return static_cast<int>(rule_.scalars.size()) + arrays + rests;
}

// The counter is the rule's first scalar. Only the optimizer has it, so that its address never
// changes.
void Plan::add_counter(PlanParam& plan_param, PyObject* counter) {
  if (!plan_param.has_kernels || !StateItem{nullptr}.takes(counter, plan_param)) return;
  pointers_of(plan_param).scalars[0] = static_cast<float*>(unpack(counter).mutable_data_ptr());
  ++plan_param.items;
}

// Lists all tensors that a step writes if every parameter has a gradient.
void Plan::find_written() {
  for (size_t i = 0; i < params_.size(); ++i) {
    if (!params_[i].complete) continue;
    params_[i].written = static_cast<int>(written_.size());
    written_.push_back({static_cast<int>(i), "", region_of(params_[i])});
  }
  for (const StateEntry& entry : state_entries_) {
    for (int i = entry.first_item; i < entry.last_item; ++i) {
      StateItem& item = items_[i];
      if (item.guard.object == nullptr || !params_[entry.param].complete) continue;
      item.written = static_cast<int>(written_.size());
      written_.push_back(
          {entry.param, PyUnicode_AsUTF8(item.key), item.region(params_[entry.param])});
    }
  }
}

// The region is empty if the parameter has no memory.
MemoryRegion Plan::region_of(const PlanParam& plan_param) const {
  if (plan_param.guard.storage == nullptr) return {};
  return MemoryRegion::of(plan_param.guard.impl, plan_param.sizes, plan_param.strides,
                          plan_param.written);
}

void Plan::find_shared_memory() {
  std::vector<MemoryRegion> regions;
  for (const Written& written : written_) regions.push_back(written.region);
  conflicts_ = overlapping_pairs(regions);
  covered_ = CoveredMemory(regions);
  for (PlanParam& plan_param : params_) plan_param.known_grad = nullptr;
}

Plan::Place Plan::place_of(const Written& written) const {
  for (size_t g = 0; g < listed_.size(); ++g) {
    for (size_t i = 0; i < listed_[g].size(); ++i) {
      if (listed_[g][i] == written.param) {
        return {static_cast<int>(g), static_cast<int>(i), written.state};
      }
    }
  }
  return {};
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
      if (plan_param.device_tensors < 0) continue;
      const DeviceTensors& device_tensors = devices_[plan_param.device_tensors];
      const TensorShape& shape = device_tensors.layout->shapes()[plan_param.index];
      const double* sum = sums[plan_param.device_tensors].const_data_ptr<double>();
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
