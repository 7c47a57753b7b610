// Launches kernels: selects the device, the number of blocks, and the arguments.
#pragma once

#include <algorithm>
#include <atomic>

#include "cuda/arguments.cuh"
#include "cuda/passes.h"

namespace fusedopt::cuda {

#define FUSEDOPT_RETURN_IF_ERROR(call) \
  if (const cudaError_t error = (call); error != cudaSuccess) return error

// Makes a device current. The destructor makes the previous device current again.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) error = cudaSetDevice(device);
    changed_ = error == cudaSuccess && before_ != device;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// The number of blocks that the device can hold at once. It is asked for once per kernel and
// device: CUDA takes longer to answer than to launch a kernel.
template <auto kernel>
cudaError_t grid_size(int device, int* blocks) {
  constexpr int kRemembered = 64;  // devices
  static std::atomic<int> known[kRemembered];
  if (device < kRemembered && (*blocks = known[device]) > 0) return cudaSuccess;
  int multiprocessors = 0, per_multiprocessor = 0;
  FUSEDOPT_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  FUSEDOPT_RETURN_IF_ERROR(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0));
  *blocks = std::max(1, multiprocessors * per_multiprocessor);
  if (device < kRemembered) known[device] = *blocks;
  return cudaSuccess;
}

template <class Argument>
cudaError_t launch_kernel(void (*kernel)(Argument), unsigned blocks, cudaStream_t stream,
                          const Argument& argument) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, argument);
}

// Launches one block per chunk, but no more than the device can hold at once. Each block then walks
// over several chunks.
template <auto kernel, int64_t kBytes>
cudaError_t launch_pass(const StepParams& step, const Launch& launch,
                        const Arguments<kBytes>& arguments) {
  int blocks = 0;
  FUSEDOPT_RETURN_IF_ERROR(grid_size<kernel>(launch.device, &blocks));
  const int64_t wanted = std::clamp<int64_t>(step.num_chunks, 1, blocks);
  return launch_kernel(kernel, static_cast<unsigned>(wanted), launch.stream, arguments);
}

// Copies the bytes [offset, offset + size) of the StepArgs.
void copy_step_args(const StepParams& step, int64_t offset, int64_t size, void* to);

template <int64_t kBytes>
Arguments<kBytes> inlined_arguments(const StepParams& step, bool reduces, void* spill) {
  Arguments<kBytes> arguments;
  arguments.step = step;
  arguments.reduces = reduces;
  arguments.is_inlined = true;
  arguments.spill = spill;
  copy_step_args(step, 0, StepArgs(step).bytes(), arguments.inlined);
  return arguments;
}

// The arguments of a pass that reads StepArgs. If the workspace has room for them (step_args), an
// earlier launch has put them there.
inline Arguments<kInlinedArgs> make_arguments(const StepParams& step, bool reduces) {
  if (step.step_args == nullptr) return inlined_arguments<kInlinedArgs>(step, reduces, nullptr);
  Arguments<kInlinedArgs> arguments;
  arguments.step = step;
  arguments.reduces = reduces;
  arguments.is_inlined = false;
  arguments.spill = nullptr;
  return arguments;
}

}  // namespace fusedopt::cuda
