// What torch knows of a GPU and the kernels need, asked without torch's CUDA headers.
#pragma once

#include <c10/core/Device.h>

namespace fusedopt {

// The device type that backend "cuda" runs on: "cpu" where CUDA is emulated, for tests.
c10::DeviceType cuda_device_type();

// Torch's current stream there, a cudaStream_t; null where the device is no GPU, as on the
// emulator.
void* current_stream(c10::Device device);

// Throws if launching on that device has failed.
void check_launch(int status, c10::Device device);

}  // namespace fusedopt
