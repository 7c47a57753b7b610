#include "torch/aten.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstddef>
#include <type_traits>

#include "torch/python_tensor.h"

namespace fusedopt {

static_assert(offsetof(TensorObject, cdata) == offsetof(THPVariable, cdata) &&
                  std::is_same_v<decltype(TensorObject::cdata), decltype(THPVariable::cdata)>,
              "python_tensor.h is not for this version of torch");

at::Tensor new_empty(int64_t numel, at::ScalarType dtype, c10::Device device) {
  return at::empty({numel}, at::TensorOptions(device).dtype(dtype));
}

at::Tensor new_zeros(int64_t numel, at::ScalarType dtype, c10::Device device) {
  return at::zeros({numel}, at::TensorOptions(device).dtype(dtype));
}

at::Tensor new_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::TensorOptions options) {
  return at::empty_strided(sizes, strides, options);
}

at::Tensor concatenated(const std::vector<at::Tensor>& tensors) { return at::cat(tensors); }

std::vector<int64_t> dense_strides_of(at::IntArrayRef sizes, at::IntArrayRef strides) {
  return at::infer_dense_strides(sizes, strides);
}

double number_of(const at::Tensor& tensor) {
  try {
    return tensor.item<double>();
  } catch (python_error& error) {
    error.restore();
    throw py::error_already_set();
  }
}

}  // namespace fusedopt
