// Gradients that a caller passes as a list. torch's setter of `grad` takes ten times as long.
#include "torch/swap_grads.h"

#include <utility>
#include <vector>

#include "torch/aten.h"
#include "torch/python_tensor.h"
#include "torch/tensor_guard.h"

namespace fusedopt {

namespace {

constexpr Py_ssize_t kAhead = 6;  // tensors that are fetched while one is looked at

void check(const py::list& params, const py::list& grads) {
  bool fits = params.size() == grads.size();
  for (size_t i = 0; fits && i < params.size(); ++i) {
    PyObject* const grad = PyList_GET_ITEM(grads.ptr(), i);
    fits = is_tensor(PyList_GET_ITEM(params.ptr(), i)) && (grad == Py_None || is_tensor(grad));
  }
  if (!fits) throw py::type_error("swap_grads() takes tensors, and a tensor or None for each");
}

void fetch_ahead(PyObject* params, PyObject* grads, Py_ssize_t at) {
  if (at + 2 * kAhead >= PyList_GET_SIZE(params)) return;
  prefetch(tensor_at(params, at + 2 * kAhead).unsafeGetTensorImpl());
  __builtin_prefetch(tensor_at(params, at + kAhead).unsafeGetTensorImpl()->autograd_meta());
  if (PyList_GET_ITEM(grads, at + kAhead) != Py_None) {
    prefetch(tensor_at(grads, at + kAhead).unsafeGetTensorImpl());
  }
}

// The gradient of the list in the parameter's dtype; undefined for None.
at::Tensor wanted_for(const at::Tensor& param, PyObject* grads, Py_ssize_t at) {
  if (PyList_GET_ITEM(grads, at) == Py_None) return {};
  const at::Tensor& grad = tensor_at(grads, at);
  return grad.dtype() == param.dtype() ? grad : grad.to(param.scalar_type());
}

}  // namespace

py::object swap_grads(const py::list& params, const py::list& grads) {
  check(params, grads);
  const size_t count = params.size();
  std::vector<at::Tensor> wanted(count);
  bool changes = false;
  for (size_t i = 0; i < count; ++i) {
    fetch_ahead(params.ptr(), grads.ptr(), i);
    const at::Tensor& param = tensor_at(params.ptr(), i);
    wanted[i] = wanted_for(param, grads.ptr(), i);
    changes |= !wanted[i].is_same(param.grad());
  }
  if (!changes) return py::none();
  py::list before(count);
  for (size_t i = 0; i < count; ++i) {
    PyObject* const object = THPVariable_Wrap(tensor_at(params.ptr(), i).grad());
    if (object == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(before.ptr(), i, object);
  }
  for (size_t i = 0; i < count; ++i) {
    tensor_at(params.ptr(), i).mutable_grad() = std::move(wanted[i]);
  }
  return before;
}

}  // namespace fusedopt
