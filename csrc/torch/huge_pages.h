// Huge pages for large states. A step reads all of a state's memory, and every page costs a lookup.
#pragma once

#include <ATen/core/Tensor.h>

namespace fusedopt {

// Asks the operating system for huge pages for a tensor's memory. Call it before the memory is
// written to. Does nothing if the system has none, or if the tensor is small.
void prefer_huge_pages(const at::Tensor& tensor);

}  // namespace fusedopt
