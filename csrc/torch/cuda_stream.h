// Asks torch for devices and streams without its CUDA headers.
#pragma once

#include <c10/core/Device.h>

namespace fusedopt {

// The device type that backend "cuda" runs on: "cpu" where CUDA is emulated, for tests.
c10::DeviceType cuda_device_type();

// torch's current stream on a device, a cudaStream_t. Null if the device is not a GPU, as on the
// emulator.
void* current_stream(c10::Device device);

// Throws if `status` says that a launch on the device has failed.
void check_launch(int status, c10::Device device);

}  // namespace fusedopt
