// The functions of ATen that the binding calls. Their headers take seconds to compile: aten.cpp
// alone includes them.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace fusedopt {

at::Tensor new_empty(int64_t numel, at::ScalarType dtype, c10::Device device);
at::Tensor new_zeros(int64_t numel, at::ScalarType dtype, c10::Device device);
at::Tensor new_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::TensorOptions options);
at::Tensor concatenated(const std::vector<at::Tensor>& tensors);

// Strides without gaps, in the order of the given ones.
std::vector<int64_t> dense_strides_of(at::IntArrayRef sizes, at::IntArrayRef strides);

// The number that the tensor has. It may run Python code of a subclass.
double number_of(const at::Tensor& tensor);

}  // namespace fusedopt
