#include "plan.h"

#include <ATen/ExpandUtils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <cstring>
#include <unordered_map>

#include "groups.h"

namespace fusedopt {

namespace {

const at::Tensor& unpack(PyObject* object) { return THPVariable_Unpack(object); }

PyObject* find(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
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

// Anything else is for Python to refuse by name.
bool is_ordinary(const at::Tensor& grad, const Source& source) {
  const at::ScalarType dtype = grad.scalar_type();
  return grad.layout() == at::kStrided && grad.device() == source.device &&
         grad.sizes().equals(source.placement.sizes) &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf);
}

}  // namespace

Placement Placement::of(const at::Tensor& tensor) {
  Placement placement;
  placement.data = tensor.data_ptr();
  placement.dtype = tensor.scalar_type();
  placement.sizes = tensor.sizes();
  placement.strides = tensor.strides();
  return placement;
}

bool Placement::matches(const at::Tensor& tensor) const {
  return tensor.unsafeGetTensorImpl()->data() == data && tensor.scalar_type() == dtype &&
         tensor.sizes().equals(sizes) && tensor.strides().equals(strides);
}

DeviceTables::DeviceTables(const std::vector<TensorEntry>& tensors,
                           const std::vector<Chunk>& chunks, c10::Device device) {
  const size_t tensor_bytes = tensors.size() * sizeof(TensorEntry);
  const size_t chunk_bytes = chunks.size() * sizeof(Chunk);
  chunks_offset_ = kTicketBytes + static_cast<int64_t>(tensor_bytes);
  at::Tensor host = at::zeros({chunks_offset_ + static_cast<int64_t>(chunk_bytes)}, at::kByte);
  char* to = static_cast<char*>(host.data_ptr());
  if (tensor_bytes > 0) memcpy(to + kTicketBytes, tensors.data(), tensor_bytes);
  if (chunk_bytes > 0) memcpy(to + chunks_offset_, chunks.data(), chunk_bytes);
  bytes_ = host.to(device);
}

Plan::Plan(const std::string& rule, const std::string& backend, const py::list& param_groups,
           const py::dict& state)
    : rule_(find_rule(rule)), backend_(backend) {
  for (const std::string& name : rule_.hyperparameters) {
    names_.push_back(PyUnicode_InternFromString(name.c_str()));
  }
  std::unordered_map<PyObject*, int> known;
  for (const py::handle& group : param_groups) {
    const uint32_t index = static_cast<uint32_t>(listed_.size());
    states_used_.push_back(read_group(rule_, names_, group.ptr(), at::kCPU).states_used);
    listed_.emplace_back();
    for (const py::handle& param : py::list(group["params"])) {
      const auto [found, is_new] = known.try_emplace(param.ptr(), sources_.size());
      listed_.back().push_back(found->second);
      if (!is_new) continue;  // listed before: updated once
      Source& source = sources_[add_source(param.ptr(), index)];
      PyObject* its_state = find(state.ptr(), param.ptr());
      if (its_state != nullptr) add_state(source, its_state, states_used_.back());
    }
  }
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
    const auto found = known.find(key);
    state_entries_.push_back({key, value, found == known.end() ? -1 : found->second});
  }
  lay_out();
}

int Plan::add_source(PyObject* object, uint32_t group) {
  const at::Tensor& param = unpack(object);
  Source source{object, group, param.device(), Placement::of(param)};
  source.dense_strides = param.strides();
  if (!param.is_non_overlapping_and_dense()) {
    source.dense_strides = at::infer_dense_strides(param.sizes(), param.strides());
  }
  while (source.partition < static_cast<int>(partitions_.size()) &&
         partitions_[source.partition].device != source.device) {
    ++source.partition;
  }
  if (source.partition == static_cast<int>(partitions_.size())) {
    partitions_.emplace_back();
    partitions_.back().device = source.device;
  }
  Partition& partition = partition_of(source);
  source.index = static_cast<int>(partition.tensors.size());

  TensorEntry entry{};
  entry.numel = param.numel();
  entry.group = group;
  entry.param_dtype = entry.state_dtype = to_dtype(param.scalar_type());
  const bool has_grad = param.grad().defined();
  entry.grad_dtype = to_dtype(grad_dtype_for(
      param.scalar_type(), has_grad ? param.grad().scalar_type() : param.scalar_type()));
  entry.param = param.data_ptr();
  if (!same_layout(param.sizes(), param.strides(), source.dense_strides) || param.is_neg()) {
    at::Tensor dense = at::empty_strided(param.sizes(), source.dense_strides, param.options());
    entry.param = dense.data_ptr();
    partition.dense_params.push_back({object, dense});
  }
  partition.tensors.push_back(entry);
  sources_.push_back(std::move(source));
  return static_cast<int>(sources_.size()) - 1;
}

void Plan::add_state(Source& source, PyObject* state, uint32_t states_used) {
  TensorEntry& entry = entry_of(source);
  PyObject *key, *value;
  size_t needed = 0;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) {
    source.items.push_back({key, value, false, {}});
    const std::string name = py::cast<std::string>(py::str(py::handle(key)));
    auto use = [&](void*& slot) {
      const at::Tensor& tensor = unpack(value);
      slot = tensor.data_ptr();
      source.items.back().used = true;
      source.items.back().placement = Placement::of(tensor);
      ++needed;
    };
    for (size_t k = 0; k < rule_.scalars.size(); ++k) {
      if (name == rule_.scalars[k]) use(reinterpret_cast<void*&>(entry.scalars[k]));
    }
    for (size_t k = 0; k < rule_.states.size(); ++k) {
      if (name != rule_.states[k] || (states_used >> k & 1) == 0) continue;
      use(entry.state[k]);
      entry.state_dtype = to_dtype(unpack(value).scalar_type());
    }
  }
  source.has_state = needed == rule_.scalars.size() + __builtin_popcount(states_used);
}

// Chunks, and memory for what the passes write.
void Plan::lay_out() {
  for (Partition& partition : partitions_) {
    for (size_t t = 0; t < partition.tensors.size(); ++t) {
      const int64_t numel = partition.tensors[t].numel;
      partition.first_chunk.push_back(static_cast<int64_t>(partition.chunks.size()));
      for (int64_t i = 0; i * kChunkSize < numel; ++i) {
        partition.chunks.push_back({static_cast<uint32_t>(t), static_cast<uint32_t>(i)});
      }
    }
    partition.first_chunk.push_back(static_cast<int64_t>(partition.chunks.size()));
    partition.spans = cpu::make_spans(partition.tensors.data(), partition.chunks);
    partition.grads.resize(partition.tensors.size());
    partition.groups.resize(listed_.size());
    const auto doubles = at::TensorOptions(partition.device).dtype(at::kDouble);
    partition.chunk_sums = at::empty({static_cast<int64_t>(partition.chunks.size())}, doubles);
    partition.control = at::zeros({sizeof(StepControl) / sizeof(double)}, doubles);
    if (on_cuda(partition)) {
      partition.tables = DeviceTables(partition.tensors, partition.chunks, partition.device);
    }
  }
}

bool Plan::refresh(const py::list& param_groups, const py::dict& state) {
  return same_params(param_groups) && same_state(state) && same_groups(param_groups) &&
         gather_grads();
}

bool Plan::same_params(const py::list& param_groups) const {
  if (param_groups.size() != listed_.size()) return false;
  for (size_t g = 0; g < listed_.size(); ++g) {
    static PyObject* const kParams = PyUnicode_InternFromString("params");
    PyObject* params = find(PyList_GET_ITEM(param_groups.ptr(), g), kParams);
    if (params == nullptr || !PyList_Check(params)) return false;
    if (PyList_GET_SIZE(params) != static_cast<Py_ssize_t>(listed_[g].size())) return false;
    for (size_t i = 0; i < listed_[g].size(); ++i) {
      const Source& source = sources_[listed_[g][i]];
      PyObject* object = PyList_GET_ITEM(params, i);
      if (object != source.object || !THPVariable_Check(object)) return false;
      const at::Tensor& param = unpack(object);
      if (param.device() != source.device || !source.placement.matches(param)) return false;
    }
  }
  return true;
}

bool Plan::same_state(const py::dict& state) const {
  if (PyDict_Size(state.ptr()) != static_cast<Py_ssize_t>(state_entries_.size())) return false;
  PyObject *key, *value;
  auto entry = state_entries_.begin();
  // Walking the dicts in their order spares hashing: Tensor.__hash__ is a call into Python.
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value); ++entry) {
    if (key != entry->key || value != entry->value) return false;
    if (entry->source < 0) continue;
    const std::vector<StateItem>& items = sources_[entry->source].items;
    if (!PyDict_Check(value) || PyDict_Size(value) != static_cast<Py_ssize_t>(items.size())) {
      return false;
    }
    auto item = items.begin();
    PyObject *name, *tensor;
    for (Py_ssize_t inner = 0; PyDict_Next(value, &inner, &name, &tensor); ++item) {
      if (name != item->key) return false;
      if (!item->used) continue;
      if (tensor != item->value || !THPVariable_Check(tensor)) return false;
      if (!item->placement.matches(unpack(tensor))) return false;
    }
  }
  return true;
}

bool Plan::same_groups(const py::list& param_groups) {
  for (Partition& partition : partitions_) {
    for (size_t g = 0; g < listed_.size(); ++g) {
      PyObject* group = PyList_GET_ITEM(param_groups.ptr(), g);
      partition.groups[g] = read_group(rule_, names_, group, partition.device);
      if (partition.groups[g].states_used != states_used_[g]) return false;
    }
  }
  return true;
}

bool Plan::gather_grads() {
  for (Partition& partition : partitions_) partition.dense_grads.clear();
  for (const Source& source : sources_) {
    if (!gather_grad(source)) return false;
  }
  return true;
}

bool Plan::gather_grad(const Source& source) {
  Partition& partition = partition_of(source);
  const TensorEntry& entry = partition.tensors[source.index];
  const at::Tensor& grad = unpack(source.object).grad();
  const void*& slot = partition.grads[source.index];
  slot = nullptr;
  if (!grad.defined()) return true;
  if (!source.has_state || !is_ordinary(grad, source)) return false;
  const at::ScalarType dtype = grad_dtype_for(source.placement.dtype, grad.scalar_type());
  if (to_dtype(dtype) != entry.grad_dtype) return false;
  const bool direct = grad.scalar_type() == dtype && !grad.is_neg() &&
                      same_layout(grad.sizes(), grad.strides(), source.dense_strides);
  if (direct) {
    static const char kEmpty = 0;  // an empty gradient is one all the same
    slot = entry.numel == 0 ? &kEmpty : grad.unsafeGetTensorImpl()->data();
    return slot != nullptr;
  }
  at::Tensor dense =
      at::empty_strided(grad.sizes(), source.dense_strides, grad.options().dtype(dtype));
  dense.copy_(grad.detach());
  slot = dense.data_ptr();
  partition.dense_grads.push_back(std::move(dense));
  return true;
}

std::vector<at::Tensor> Plan::tensors_in_use() const {
  std::vector<at::Tensor> result;
  for (const Source& source : sources_) {
    result.push_back(unpack(source.object));
    result.push_back(unpack(source.object).grad());
    for (const StateItem& item : source.items) {
      if (item.used) result.push_back(unpack(item.value));
    }
  }
  return result;
}

std::vector<std::pair<int, int>> Plan::nonfinite() const {
  std::vector<at::Tensor> sums;
  for (const Partition& partition : partitions_) {
    sums.push_back(partition.chunk_sums.to(at::kCPU).contiguous());
  }
  std::vector<std::pair<int, int>> result;
  for (size_t g = 0; g < listed_.size(); ++g) {
    for (size_t i = 0; i < listed_[g].size(); ++i) {
      const Source& source = sources_[listed_[g][i]];
      const std::vector<int64_t>& first = partitions_[source.partition].first_chunk;
      const double* sum = sums[source.partition].data_ptr<double>();
      bool finite = true;
      for (int64_t c = first[source.index]; c < first[source.index + 1]; ++c) {
        finite = finite && std::isfinite(sum[c]);
      }
      if (!finite) result.emplace_back(static_cast<int>(g), static_cast<int>(i));
    }
  }
  return result;
}

}  // namespace fusedopt
