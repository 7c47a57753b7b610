// What torch knows of a GPU and its kernels' launches need, asked without torch's CUDA headers.
#pragma once

#if FUSEDOPT_WITH_CUDA

#include <c10/core/Device.h>
#include <cuda_runtime.h>

namespace fusedopt {

int device_index(c10::Device device);

// Torch's current stream there; null where the device is no GPU, as on the emulator.
cudaStream_t current_stream(c10::Device device);

// Throws if launching on that device has failed.
void check_launch(cudaError_t error, c10::Device device);

}  // namespace fusedopt

#endif
