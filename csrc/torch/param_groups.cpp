#include "torch/param_groups.h"

#include <torch/csrc/autograd/python_variable.h>

namespace fusedopt {

namespace {

double to_double(PyObject* value) {
  if (PyFloat_Check(value)) return PyFloat_AS_DOUBLE(value);
  if (THPVariable_Check(value)) return THPVariable_Unpack(value).item<double>();
  const double number = PyFloat_AsDouble(value);
  if (PyErr_Occurred()) throw py::error_already_set();
  return number;
}

bool stays_on_device(PyObject* value, c10::Device device) {
  if (!THPVariable_Check(value)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(value);
  return !device.is_cpu() && tensor.device() == device &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

}  // namespace

bool has_kernels(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

Storage to_storage(at::ScalarType type) {
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
      throw py::type_error(std::string("no kernel takes ") + c10::toString(type));
  }
}

Group read_group(const RuleInfo& rule, const std::vector<PyObject*>& names, PyObject* group,
                 c10::Device device, double* hyperparameters) {
  Group result{};
  for (size_t i = 0; i < names.size(); ++i) {
    const OptionInfo& option = rule.options[i];
    PyObject* value = PyDict_GetItemWithError(group, names[i]);
    if (value == nullptr) throw py::key_error(option.name);
    const bool is_sequence = PyTuple_Check(value) || PyList_Check(value);
    if (is_sequence != (option.count > 1) ||
        (is_sequence && PySequence_Fast_GET_SIZE(value) != option.count)) {
      throw py::value_error(
          "a param group's " + option.name + " is " + py::cast<std::string>(py::repr(value)) +
          "; expected " +
          (option.count == 1 ? "one number" : std::to_string(option.count) + " numbers"));
    }
    double* const numbers = hyperparameters + option.first;
    if (is_sequence) {
      for (int k = 0; k < option.count; ++k) {
        numbers[k] = to_double(PySequence_Fast_GET_ITEM(value, k));
      }
    } else if (option.name == "lr" && stays_on_device(value, device)) {
      const at::Tensor& lr = THPVariable_Unpack(value);
      result.lr = lr.data_ptr();
      result.lr_storage = to_storage(lr.scalar_type());
      numbers[0] = 0;  // which states there are doesn't depend on it
    } else {
      const double number = to_double(value);
      numbers[0] = option.on_host != nullptr ? option.on_host(number) : number;
    }
  }
  result.states_used = rule.states_used(hyperparameters);
  return result;
}

}  // namespace fusedopt
