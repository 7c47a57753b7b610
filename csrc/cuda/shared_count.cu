#include "cuda/shared_count.h"

#include <algorithm>

#include "cuda/launch.cuh"
#include "math/power.h"

namespace fusedopt::cuda {

namespace {

struct Spread {
  const int32_t* steps;
  float* values;
  int64_t size;
  int per_tensor;
  float factors[kMaxScalars];

  // An index that is no constant would read the arguments one thread after the other.
  __device__ float factor(int k) const {
    float result = 0;
#pragma unroll
    for (int i = 0; i < kMaxScalars; ++i) {
      if (i == k) result = factors[i];
    }
    return result;
  }
};

__global__ void __launch_bounds__(kThreads) spread_kernel(const __grid_constant__ Spread spread) {
  const int64_t first = blockIdx.x * kThreads + threadIdx.x;
  for (int64_t i = first; i < spread.size; i += gridDim.x * kThreads) {
    const int k = static_cast<int>(i % spread.per_tensor);
    spread.values[i] = k == 0 ? static_cast<float>(*spread.steps)
                              : product_after(*spread.steps, spread.factor(k - 1));
  }
}

struct Collected {
  const StepControl* control;
  SharedCount count;
};

__global__ void __launch_bounds__(kThreads)
    collect_kernel(const __grid_constant__ Collected collected) {
  if (threadIdx.x != 0) return;
  const StepControl& control = *collected.control;
  *collected.count.grad_norm = static_cast<float>(control.grad_norm);
  const bool skipped = control.step_skipped != 0;
  *collected.count.skips += skipped ? 1 : 0;
  *collected.count.steps += skipped ? 0 : 1;
}

}  // namespace

cudaError_t spread_count(const int32_t* steps, const SharedScalars& scalars, int64_t num_tensors,
                         Launch launch) {
  const DeviceScope scope(launch.device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  Spread spread{steps, scalars.values, num_tensors * scalars.count, scalars.count, {}};
  std::copy_n(scalars.factors, std::max(0, scalars.count - 1), spread.factors);
  const int64_t blocks = (spread.size + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  return launch_kernel(spread_kernel, static_cast<unsigned>(blocks), launch.stream, spread);
}

cudaError_t collect_count(const StepControl& control, const SharedCount& count, Launch launch) {
  const DeviceScope scope(launch.device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  return launch_kernel(collect_kernel, 1, launch.stream, Collected{&control, count});
}

}  // namespace fusedopt::cuda
