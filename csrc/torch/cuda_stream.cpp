#include "torch/cuda_stream.h"

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

#include "kernels.h"

namespace py = pybind11;

namespace fusedopt {

#if !defined(FUSEDOPT_CUDA_DEVICE)
#define FUSEDOPT_CUDA_DEVICE c10::kCUDA
#endif

c10::DeviceType cuda_device_type() { return FUSEDOPT_CUDA_DEVICE; }

void* current_stream(c10::Device device) {
  if (!device.is_cuda()) return nullptr;
  static const py::object* const get =
      new py::object(py::module_::import("torch._C").attr("_cuda_getCurrentRawStream"));
  return reinterpret_cast<void*>(py::cast<uintptr_t>((*get)(device.index())));
}

void check_launch(int status, c10::Device device) {
  TORCH_CHECK(status == 0, "fusedopt: launching the step on ", device, " failed with ",
              error_name(status));
}

}  // namespace fusedopt
