// The three calls of a step on CUDA. They enqueue kernels on a stream and never wait.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "core/params.h"

namespace fusedopt::cuda {

// The device and the stream that kernels are launched on.
struct Launch {
  int device;
  cudaStream_t stream;
};

// StepArgs (core/layout.h), the values that change at every step, travel in the kernels' arguments:
// there is no copy to wait for, and a captured graph keeps its own. Up to about 450 tensors every
// kernel carries them. Up to about 4,000 tensors the norm pass carries them and copies them to
// step.step_args for the update. Beyond that, or without a norm pass, separate launches carry them
// to step.step_args first, one per 4,000 tensors.
cudaError_t measure(const StepParams& step, Launch launch);
cudaError_t reduce(const StepParams& step, Launch launch);
cudaError_t write_message(const StepParams& step, const bool* counted, int64_t* message,
                          Launch launch);
cudaError_t read_message(const StepParams& step, const int64_t* total, float* skip, Launch launch);
template <class Rule>
cudaError_t update(const StepParams& step, Launch launch);

// The whole step in two launches: the last block of the norm pass reduces. Without
// step.options.measure, only the update is launched. The update of a rule with a trust ratio takes
// two launches.
template <class Rule>
cudaError_t run_step(const StepParams& step, Launch launch);

// Copies host memory to the device in kernels' arguments, 32 KB per launch.
cudaError_t upload(Launch launch, void* to, const void* from, size_t bytes);

}  // namespace fusedopt::cuda
