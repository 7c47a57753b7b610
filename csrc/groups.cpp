#include "groups.h"

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
  int count = 0;
  for (size_t i = 0; i < names.size(); ++i) {
    PyObject* value = PyDict_GetItemWithError(group, names[i]);
    if (value == nullptr) throw py::key_error(rule.hyperparameters[i]);
    if (PyTuple_Check(value) || PyList_Check(value)) {
      for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(value); ++k) {
        TORCH_CHECK(count < kMaxHyperparameters, rule.hyperparameters[i], " has too many items");
        result.values[count++] = to_double(PySequence_Fast_GET_ITEM(value, k));
      }
    } else if (count == 0 && stays_on_device(value, device)) {
      const at::Tensor& lr = THPVariable_Unpack(value);
      result.lr = lr.data_ptr();
      result.lr_dtype = to_dtype(lr.scalar_type());
      result.values[count++] = 0;
    } else {
      result.values[count++] = to_double(value);
    }
  }
  // lr decides nothing here, and may lie where the host can't read it.
  Group on_host = result;
  on_host.lr = nullptr;
  result.states_used = rule.states_used(on_host);
  return result;
}

}  // namespace fusedopt
