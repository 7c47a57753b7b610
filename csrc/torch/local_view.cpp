#include "torch/local_view.h"

#include "torch/python_tensor.h"

namespace fusedopt {

namespace {

// The attribute of a DTensor, or null.
py::object attribute(PyObject* object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object, name);
  if (value == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(value);
}

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

PyObject* local_tensor_name() {
  static PyObject* const name = interned("_local_tensor");
  return name;
}

// Compares objects with a list, one after the other.
class Comparison {
 public:
  explicit Comparison(const py::list& seen) : seen_(seen.ptr()), size_(PyList_GET_SIZE(seen_)) {}

  bool is_next(PyObject* object) { return at_ < size_ && PyList_GET_ITEM(seen_, at_++) == object; }

  // The object, and then its local tensor: of what is no DTensor, the object itself.
  bool are_next(PyObject* object) {
    if (!is_next(object) || at_ >= size_) return false;
    PyObject* const local = PyList_GET_ITEM(seen_, at_++);
    return local == object || attribute(object, local_tensor_name()).ptr() == local;
  }

  bool is_at_end() const { return at_ == size_; }

 private:
  PyObject* seen_;  // not owned
  Py_ssize_t size_, at_ = 0;
};

bool are_params(PyObject* params, Comparison& comparison) {
  if (params == nullptr || !PyList_Check(params)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    if (!comparison.are_next(PyList_GET_ITEM(params, i))) return false;
  }
  return true;
}

bool is_entry(PyObject* entry, Comparison& comparison) {
  if (!PyDict_Check(entry)) return true;
  PyObject *name, *value;
  Py_ssize_t at = 0;
  while (PyDict_Next(entry, &at, &name, &value)) {
    if (!comparison.is_next(name) || !comparison.are_next(value)) return false;
  }
  return true;
}

}  // namespace

bool is_same_view(const py::list& seen, const py::list& param_groups, const py::dict& state) {
  Comparison comparison(seen);
  for (const py::handle group : param_groups) {
    if (!PyDict_Check(group.ptr()) || !comparison.is_next(group.ptr())) return false;
    if (!are_params(PyDict_GetItemString(group.ptr(), "params"), comparison)) return false;
  }
  PyObject *key, *entry;
  Py_ssize_t at = 0;
  while (PyDict_Next(state.ptr(), &at, &key, &entry)) {
    if (!comparison.are_next(key) || !comparison.is_next(entry)) return false;
    if (!is_entry(entry, comparison)) return false;
  }
  return comparison.is_at_end();
}

bool take_local_grads(const py::list& params, const py::list& locals, const py::list& layouts) {
  static PyObject* const layout_name = interned("_spec");
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& grad = tensor_at(params.ptr(), i).grad();
    if (!grad.defined()) continue;
    const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
    PyObject* const known = PyList_GET_ITEM(layouts.ptr(), i);
    if (known == Py_None || attribute(object.ptr(), layout_name).ptr() != known) return false;
    const py::object local = attribute(object.ptr(), local_tensor_name());
    if (!local || !is_tensor(local.ptr())) return false;
    tensor_at(locals.ptr(), i).mutable_grad() = unpack(local.ptr());
  }
  return true;
}

void drop_local_grads(const py::list& locals) {
  for (size_t i = 0; i < locals.size(); ++i) tensor_at(locals.ptr(), i).mutable_grad().reset();
}

}  // namespace fusedopt
