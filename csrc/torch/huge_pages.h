// Large pages for large states: a step walks all of them, and each small page costs a lookup.
#pragma once

#include <ATen/core/Tensor.h>

namespace fusedopt {

// Asks the operating system to back a tensor's memory, which is best not yet written to, with huge
// pages. Changes nothing where there are none, or the tensor is small.
void prefer_huge_pages(const at::Tensor& tensor);

}  // namespace fusedopt
