// What a step does with its gradients: the global norm, the clip coefficient, update or skip.
#pragma once

#include <cmath>

#include "inline.h"

namespace fusedopt {

// What the norm pass measures: the sum of squares, or the norm itself (the largest magnitude).
enum class NormType { kL2, kInf };

// What the caller asks of a step, the same for every tensor.
struct StepOptions {
  double max_grad_norm;     // infinity: never clip
  bool skip_nonfinite;      // leave everything as it was when a gradient holds inf or nan
  bool measure;             // the norm is known before the update (else the update pass sums it up)
  const float* grad_scale;  // null, or what the loss was multiplied by
  const float* found_inf;   // null, or non-zero when the caller asks for a skip
  NormType norm_type;       // of the norm that `max_grad_norm` limits
  bool only_scales;         // nothing but the gradients changes: a factor of 1 leaves nothing to do
};

// What a step leaves behind. All are doubles, so that Python reads the struct as one float64
// tensor.
struct StepControl {
  double sum_of_squares;  // of the gradients as they are, before unscaling (or their inf norm)
  double grad_norm;       // after unscaling, before clipping
  double clip_coef;
  double step_skipped;   // 0 or 1
  double skipped_steps;  // how many so far
};

struct Decision {
  double grad_norm;
  double clip_coef;
  double grad_factor;  // unscaling and clipping in one multiplication
  bool skip;
};

// Pascanu, Mikolov and Bengio (2013), as torch.nn.utils.clip_grad_norm_ does it. A sum of squares
// in float64 can't overflow for finite float32 gradients, so that its finiteness is the inf/nan
// check.
FUSEDOPT_INLINE Decision decide(const StepOptions& options, double sum_of_squares) {
  const double inv_scale =
      options.grad_scale ? 1.0 / static_cast<double>(*options.grad_scale) : 1.0;
  Decision decision;
  const double norm =
      options.norm_type == NormType::kL2 ? std::sqrt(sum_of_squares) : sum_of_squares;
  decision.grad_norm = norm * inv_scale;
  decision.clip_coef = 1.0;
  if (options.max_grad_norm != HUGE_VAL) {
    const double coef = options.max_grad_norm / (decision.grad_norm + 1e-6);
    decision.clip_coef = coef > 1.0 ? 1.0 : coef;  // nan stays nan
  }
  decision.grad_factor = inv_scale * decision.clip_coef;
  const bool told_to_skip = options.found_inf != nullptr && *options.found_inf != 0.0f;
  const bool finite = sum_of_squares - sum_of_squares == 0.0;  // false for inf and nan
  const bool nothing_to_do = options.only_scales && decision.grad_factor == 1.0;
  decision.skip = told_to_skip || (options.skip_nonfinite && !finite) || nothing_to_do;
  return decision;
}

FUSEDOPT_INLINE void record(StepControl& control, const Decision& decision, double sum_of_squares) {
  control.sum_of_squares = sum_of_squares;
  control.grad_norm = decision.grad_norm;
  control.clip_coef = decision.clip_coef;
  control.step_skipped = decision.skip ? 1.0 : 0.0;
  control.skipped_steps += control.step_skipped;
}

}  // namespace fusedopt
