// The two passes on CUDA: enqueued on a stream, never waited for.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "core/params.h"

namespace fusedopt::cuda {

// Where the kernels run, and what they need of the device's memory beside the tables in the pass.
struct Launch {
  int device;
  cudaStream_t stream;
  unsigned* tickets;  // one per pass, zero: counts the blocks that are done, and ends at zero again
  void* step_args;    // moving_bytes(pass) of them, or null where 0 are needed
  bool step_args_are_there;  // left by this step's norm pass
};

// What moves from step to step (gradient pointers, hyperparameters) travels in the kernels'
// arguments: there is no copy to wait for, and a captured graph keeps its own. Up to about 450
// tensors it stays there; more need this many bytes of device memory, where the first launch leaves
// it for the second. Beyond about 4,000 tensors one more launch per 4,000 carries it.
size_t step_args_bytes(const StepParams& step);

// Of the pass, `groups` and `grads` lie in host memory, all else on the device.
template <class Rule>
cudaError_t run(const StepParams& step, Launch launch, Phases phases);

// A copy of host memory, in kernels' arguments as above: 32 KB a launch. `size` is a multiple of 8.
cudaError_t upload(int device, cudaStream_t stream, void* to, const void* from, size_t size);

}  // namespace fusedopt::cuda
