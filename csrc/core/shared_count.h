// Counters that all tensors share, on a CUDA device. For front ends that have none per tensor.
#pragma once

#include <cstdint>

namespace fusedopt {

struct SharedCount {
  int32_t *steps, *skips;  // applied and skipped steps
  float* grad_norm;        // of the last step
};

// The scalars of all tensors, one tensor after another: the count of steps, and numbers that every
// step has multiplied by a factor.
struct SharedScalars {
  const float* factors;  // on the host
  int count;             // per tensor, with the count of steps
  float* values;
};

}  // namespace fusedopt
