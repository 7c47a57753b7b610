// The tensor in a Python object.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <torch/csrc/Export.h>
#include <torch/headeronly/version.h>

// torch's own header takes 9 seconds to compile. These are the parts of it that the binding needs,
// for versions whose header was compared with them: aten.cpp compares again when it is compiled.
#if TORCH_VERSION_MAJOR == 2 && (TORCH_VERSION_MINOR == 13 || TORCH_VERSION_MINOR == 14)
TORCH_PYTHON_API extern PyObject* THPVariableClass;
TORCH_PYTHON_API extern PyObject* ParameterClass;
TORCH_PYTHON_API PyObject* THPVariable_Wrap(const at::TensorBase& var);

namespace fusedopt {

struct TensorObject {
  PyObject head;
  at::Tensor cdata;
};

inline const at::Tensor& unpack(PyObject* object) {
  return reinterpret_cast<TensorObject*>(object)->cdata;
}

}  // namespace fusedopt
#else
#include <torch/csrc/autograd/python_variable.h>

namespace fusedopt {

using TensorObject = THPVariable;

inline const at::Tensor& unpack(PyObject* object) { return THPVariable_Unpack(object); }

}  // namespace fusedopt
#endif

namespace fusedopt {

// The same as THPVariable_Check, but it never runs Python code.
inline bool is_tensor(PyObject* object) {
  PyTypeObject* const type = Py_TYPE(object);
  const auto is_exactly = [&](PyObject* it) { return type == reinterpret_cast<PyTypeObject*>(it); };
  return is_exactly(THPVariableClass) || is_exactly(ParameterClass) ||
         PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// The tensor at a place of a Python list.
inline at::Tensor& tensor_at(PyObject* list, Py_ssize_t index) {
  return const_cast<at::Tensor&>(unpack(PyList_GET_ITEM(list, index)));
}

}  // namespace fusedopt
