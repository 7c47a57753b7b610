// The three calls of a step on CUDA: enqueued on a stream, never waited for.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "core/params.h"

namespace fusedopt::cuda {

// Where kernels are launched.
struct Launch {
  int device;
  cudaStream_t stream;
};

// What changes from step to step (core/layout.h, StepArgs) travels in the kernels' arguments: there
// is no copy to wait for, and a captured graph keeps its own. Up to about 450 tensors it stays
// there. More of it is left in step.step_args by the first kernel that has it. Beyond about 4,000
// tensors one more launch per 4,000 carries it there.
cudaError_t measure(const StepParams& step, Launch launch);
cudaError_t reduce(const StepParams& step, Launch launch);
template <class Rule>
cudaError_t update(const StepParams& step, Launch launch);

// All of them, in two launches: the last block of the norm pass reduces.
template <class Rule>
cudaError_t run_step(const StepParams& step, Launch launch);

// A copy of host memory, in kernels' arguments as above: 32 KB a launch.
cudaError_t upload(Launch launch, void* to, const void* from, size_t bytes);

}  // namespace fusedopt::cuda
