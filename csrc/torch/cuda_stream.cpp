#include "torch/cuda_stream.h"

#if FUSEDOPT_WITH_CUDA

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

#include <algorithm>

namespace py = pybind11;

namespace fusedopt {

int device_index(c10::Device device) { return std::max<int>(0, device.index()); }

cudaStream_t current_stream(c10::Device device) {
  if (!device.is_cuda()) return nullptr;
  static const py::object* const get =
      new py::object(py::module_::import("torch._C").attr("_cuda_getCurrentRawStream"));
  return reinterpret_cast<cudaStream_t>(py::cast<uintptr_t>((*get)(device.index())));
}

void check_launch(cudaError_t error, c10::Device device) {
  TORCH_CHECK(error == cudaSuccess, "fusedopt: launching the step on ", device, " failed with ",
              cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

}  // namespace fusedopt

#endif
