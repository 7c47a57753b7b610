#include "torch/cuda_stream.h"

#include <c10/util/Exception.h>

#include "kernels.h"
#include "torch/python.h"

namespace fusedopt {

namespace {

// The result of a call of Python's, or its error.
py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

}  // namespace

#if !defined(FUSEDOPT_CUDA_DEVICE)
#define FUSEDOPT_CUDA_DEVICE c10::kCUDA
#endif

c10::DeviceType cuda_device_type() { return FUSEDOPT_CUDA_DEVICE; }

void* current_stream(c10::Device device) {
  if (!device.is_cuda()) return nullptr;
  static PyObject* const get =
      owned(PyObject_GetAttrString(owned(PyImport_ImportModule("torch._C")).ptr(),
                                   "_cuda_getCurrentRawStream"))
          .release()
          .ptr();
  const py::object stream =
      owned(PyObject_CallFunction(get, "i", static_cast<int>(device.index())));
  void* const result = PyLong_AsVoidPtr(stream.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return result;
}

void check_launch(int status, c10::Device device) {
  TORCH_CHECK(status == 0, "fusedopt: launching the step on ", device, " failed with ",
              error_name(status));
}

}  // namespace fusedopt
