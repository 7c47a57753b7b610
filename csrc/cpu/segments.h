// Clips of single units (a row, a filter) on the CPU.
#pragma once

#include <vector>

#include "core/params.h"
#include "cpu/isa.h"

namespace fusedopt::cpu {

// The squares of a chunk's units, of gradients and parameters.
void measure_units(const StepParams& step, Isa isa, int64_t chunk);

// A thread's copies of gradients, each unit's multiplied by its own factor.
class UnitScaler {
 public:
  UnitScaler(const StepParams& step, Isa isa, const Decision& decision);

  // A chunk's gradients, unscaled and clipped, until the next call.
  const void* scale(int64_t chunk);
  // Their dtype: the one that the tensor is computed in.
  static Dtype dtype_of(const TensorEntry& tensor) {
    return tensor.param_dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  }

 private:
  double coef_of(uint32_t tensor, int64_t unit);

  const StepParams& step_;
  const Isa isa_;
  const Decision decision_;
  std::vector<double> scaled_;
  uint32_t tensor_ = UINT32_MAX;  // of which the coefficient of a unit is known: a long one has
  int64_t unit_ = -1;             // many chunks
  double coef_ = 0;
};

}  // namespace fusedopt::cpu
