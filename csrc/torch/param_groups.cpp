#include "torch/param_groups.h"

#include "torch/aten.h"
#include "torch/tensor_guard.h"

namespace fusedopt {

namespace {

double to_double(PyObject* value) {
  if (PyFloat_Check(value)) return PyFloat_AS_DOUBLE(value);
  if (is_tensor(value)) {
    const at::Tensor& tensor = unpack(value);
    // torch would read a number from freed memory.
    if (is_plain(tensor.unsafeGetTensorImpl()) && !fits_its_storage(tensor.unsafeGetTensorImpl())) {
      throw py::value_error("a tensor's storage was freed or cut");
    }
    return number_of(tensor);
  }
  const double number = PyFloat_AsDouble(value);
  if (PyErr_Occurred()) throw py::error_already_set();
  return number;
}

bool is_list_or_tuple(PyObject* value) { return PyList_Check(value) || PyTuple_Check(value); }

py::object item_of(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(value);
}

// Returns a list or tuple as it is, and the items of any other iterable as a list. Refuses
// iterators, as reading uses them up, and tensors, as every reading makes new rows.
py::object as_list(py::handle iterable) {
  PyObject* const value = iterable.ptr();
  if (is_list_or_tuple(value)) return py::reinterpret_borrow<py::object>(value);
  if (PyIter_Check(value) || PyUnicode_Check(value) || is_tensor(value)) {
    throw py::type_error("expected a list, not " +
                         std::string(py::str(py::type::handle_of(iterable))));
  }
  PyObject* const list = PySequence_List(value);
  if (list == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(list);
}

[[noreturn]] void refuse(const OptionInfo& option, py::handle value) {
  throw py::value_error(
      "a param group's " + option.name + " is " + std::string(py::repr(value)) + "; expected " +
      (option.count == 1 ? "one number" : std::to_string(option.count) + " numbers"));
}

// Each number's conversion may run Python code, which may change the sequence.
void read_numbers(const OptionInfo& option, const py::object& value, double* numbers) {
  if (is_list_or_tuple(value.ptr())) {
    for (Py_ssize_t k = 0; k < option.count; ++k) {
      if (PySequence_Fast_GET_SIZE(value.ptr()) != option.count) refuse(option, value);
      PyObject* const item = PySequence_Fast_GET_ITEM(value.ptr(), k);
      numbers[k] = to_double(py::reinterpret_borrow<py::object>(item).ptr());
    }
    return;
  }
  const bool is_text = PyUnicode_Check(value.ptr()) || PyBytes_Check(value.ptr());
  const bool has_items = PySequence_Check(value.ptr()) || is_tensor(value.ptr());
  if (is_text || !has_items) refuse(option, value);
  const py::list items(value);  // a deque, an array, a tensor, a configuration's list ...
  if (static_cast<int>(items.size()) != option.count) refuse(option, value);
  for (int k = 0; k < option.count; ++k) numbers[k] = to_double(py::object(items[k]).ptr());
}

// Whether the group says that its gradients are not clipped.
bool read_unclipped(PyObject* group) {
  static PyObject* const kClipped = PyUnicode_InternFromString("clipped");
  const py::object value = item_of(group, kClipped);
  if (!value || value.ptr() == Py_True) return false;
  if (value.ptr() == Py_False) return true;
  throw py::value_error("a param group's clipped is " + std::string(py::repr(value)) +
                        "; expected True or False");
}

bool stays_on_device(PyObject* value, c10::Device device) {
  if (device.is_cpu() || !is_tensor(value)) return false;
  const at::Tensor& tensor = unpack(value);
  return is_plain(tensor.unsafeGetTensorImpl()) && tensor.device() == device &&
         tensor.numel() == 1 && !tensor.is_neg() &&
         fits_its_storage(tensor.unsafeGetTensorImpl()) &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

}  // namespace

std::optional<Storage> storage_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Storage::kFloat32;
    case at::kDouble:
      return Storage::kFloat64;
    case at::kBFloat16:
      return Storage::kBFloat16;
    case at::kHalf:
      return Storage::kFloat16;
    default:
      return std::nullopt;
  }
}

bool has_kernels(at::ScalarType type) { return storage_of(type).has_value(); }

Storage to_storage(at::ScalarType type) {
  const std::optional<Storage> storage = storage_of(type);
  if (!storage) throw py::type_error(std::string("no kernel takes ") + c10::toString(type));
  return *storage;
}

py::object as_dict(py::handle mapping) {
  if (PyDict_Check(mapping.ptr())) return py::reinterpret_borrow<py::object>(mapping);
  py::dict dict;
  if (PyDict_Update(dict.ptr(), mapping.ptr()) != 0) throw py::error_already_set();
  return dict;
}

void CurrentGroups::read(py::handle param_groups) {
  static PyObject* const kParams = PyUnicode_InternFromString("params");
  clear();
  const py::object list = as_list(param_groups);
  for (Py_ssize_t g = 0; g < PySequence_Fast_GET_SIZE(list.ptr()); ++g) {
    const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(list.ptr(), g));
    py::object group = as_dict(item);
    const py::object params = item_of(group.ptr(), kParams);
    if (!params) throw py::key_error("params");
    groups_.emplace_back(std::move(group), as_list(params));
  }
}

Group read_group(const RuleInfo& rule, const std::vector<PyObject*>& names, PyObject* group,
                 c10::Device device, double* hyperparameters) {
  Group result{};
  result.is_unclipped = read_unclipped(group);
  for (size_t i = 0; i < names.size(); ++i) {
    const OptionInfo& option = rule.options[i];
    double* const numbers = hyperparameters + option.first;
    const py::object value = item_of(group, names[i]);
    if (!value && option.optional) {
      numbers[0] = 0;
      continue;
    }
    if (!value) throw py::key_error(option.name);
    if (option.count > 1) {
      read_numbers(option, value, numbers);
      for (int k = 0; k < option.count; ++k) {
        if (!in_range(option, numbers[k])) refuse(option, value);
        if (option.on_host != nullptr) numbers[k] = option.on_host(numbers[k]);
      }
    } else if (is_list_or_tuple(value.ptr())) {
      refuse(option, value);
    } else if (option.name == "lr" && stays_on_device(value.ptr(), device)) {
      const at::Tensor& lr = unpack(value.ptr());
      result.lr = lr.const_data_ptr();
      result.lr_storage = to_storage(lr.scalar_type());
      numbers[0] = 0;  // states_used() does not depend on it
    } else {
      const double number = to_double(value.ptr());
      if (!in_range(option, number)) refuse(option, value);
      numbers[0] = option.on_host != nullptr ? option.on_host(number) : number;
    }
  }
  result.states_used = rule.states_used(hyperparameters);
  return result;
}

}  // namespace fusedopt
