// Gradients that a caller passes as a list. torch's setter of `grad` takes ten times as long.
#include "torch/swap_grads.h"

#include <utility>
#include <vector>

#include "torch/aten.h"
#include "torch/python_tensor.h"

namespace fusedopt {

namespace {

void check(const py::list& params, const py::list& grads) {
  bool fits = params.size() == grads.size();
  for (size_t i = 0; fits && i < params.size(); ++i) {
    PyObject* const grad = PyList_GET_ITEM(grads.ptr(), i);
    fits = is_tensor(PyList_GET_ITEM(params.ptr(), i)) && (grad == Py_None || is_tensor(grad));
  }
  if (!fits) throw py::type_error("swap_grads() takes tensors, and a tensor or None for each");
}

}  // namespace

py::list swap_grads(const py::list& params, const py::list& grads) {
  check(params, grads);
  std::vector<at::Tensor> wanted(params.size());
  py::list before(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& param = tensor_at(params.ptr(), i);
    if (PyList_GET_ITEM(grads.ptr(), i) != Py_None) {
      const at::Tensor& grad = tensor_at(grads.ptr(), i);
      wanted[i] = grad.dtype() == param.dtype() ? grad : grad.to(param.scalar_type());
    }
    PyObject* const object = THPVariable_Wrap(param.grad());
    if (object == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(before.ptr(), i, object);
  }
  for (size_t i = 0; i < params.size(); ++i) {
    tensor_at(params.ptr(), i).mutable_grad() = std::move(wanted[i]);
  }
  return before;
}

}  // namespace fusedopt
