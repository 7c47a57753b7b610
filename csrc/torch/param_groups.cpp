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

Dtype to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      throw py::type_error(std::string("no kernel takes ") + c10::toString(type));
  }
}

Group read_group(const RuleInfo& rule, const std::vector<PyObject*>& names, PyObject* group,
                 c10::Device device) {
  Group result{};
  int at = 0;
  for (size_t i = 0; i < names.size(); ++i) {
    const auto [name, count, on_host] = rule.hyperparameters[i];
    PyObject* value = PyDict_GetItemWithError(group, names[i]);
    if (value == nullptr) throw py::key_error(name);
    const bool is_sequence = PyTuple_Check(value) || PyList_Check(value);
    if (is_sequence != (count > 1) || (is_sequence && PySequence_Fast_GET_SIZE(value) != count)) {
      throw py::value_error(std::string("a param group's ") + name + " is " +
                            py::cast<std::string>(py::repr(value)) + "; expected " +
                            (count == 1 ? "one number" : std::to_string(count) + " numbers"));
    }
    if (is_sequence) {
      for (int k = 0; k < count; ++k) {
        result.values[at++] = to_double(PySequence_Fast_GET_ITEM(value, k));
      }
    } else if (at == 0 && stays_on_device(value, device)) {
      const at::Tensor& lr = THPVariable_Unpack(value);
      result.lr = lr.data_ptr();
      result.lr_dtype = to_dtype(lr.scalar_type());
      ++at;
    } else {
      const double number = to_double(value);
      result.values[at++] = on_host != nullptr ? on_host(number) : number;
    }
  }
  // Which states there are does not depend on lr, and lr may lie where the host can't read it.
  Group on_host = result;
  on_host.lr = nullptr;
  result.states_used = rule.states_used(on_host);
  return result;
}

}  // namespace fusedopt
