// The decision of a step: from the sum of squares to the clip coefficient, or to a skip.
#pragma once

#include <cmath>
#include <iterator>

#include "core/limits.h"
#include "math/inline.h"

namespace fusedopt {

// kL2: the norm pass adds up squares. kInf: the norm pass takes the largest magnitude, and that is
// the norm.
enum class NormType { kL2, kInf };

// The caller's options for a step. They are the same for every tensor.
struct StepOptions {
  double max_grad_norm;     // infinity: never clip
  Limit limit;              // an adaptive limit; kFixed: max_grad_norm alone counts
  bool skip_nonfinite;      // change nothing if a gradient is inf or nan
  bool measure;             // measure the norm before the update; else the update pass sums it up
  const float* grad_scale;  // null, or the factor that the loss was multiplied by
  const float* found_inf;   // null, or the address of a number that is non-zero to ask for a skip
  NormType norm_type;       // the norm that `max_grad_norm` limits
  bool only_scales;         // only gradients are scaled, so that a factor of 1 changes nothing
};

// The results of a step. All fields are doubles, so that Python reads the struct as one float64
// tensor.
struct StepControl {
  double sum_of_squares;     // of the gradients before unscaling; for kInf, their largest magnitude
  double grad_norm;          // after unscaling, before clipping
  double clip_coef;          // the smallest one, if segments have their own
  double step_skipped;       // 0 or 1
  double skipped_steps;      // so far
  double consecutive_skips;  // skipped steps in a row, up to and including the last step
  double steps;              // so far, skipped ones included
};

// The names of StepControl's fields, in order, for front ends.
inline constexpr const char* kControlFields[] = {
    "sum_of_squares", "grad_norm",         "clip_coef", "step_skipped",
    "skipped_steps",  "consecutive_skips", "steps"};
static_assert(sizeof(StepControl) == std::size(kControlFields) * sizeof(double));

struct Decision {
  double inv_scale;
  double grad_norm;
  double clip_coef;
  double grad_factor;  // unscaling and clipping in one multiplication
  bool skip;
};

// Clips as torch.nn.utils.clip_grad_norm_ does: Pascanu, Mikolov and Bengio (2013). The check for
// inf and nan asks whether the sum of squares is finite: a sum in float64 can't overflow for finite
// float32 gradients.
FUSEDOPT_INLINE Decision decide(const StepOptions& options, double sum_of_squares) {
  Decision decision;
  decision.inv_scale = options.grad_scale ? 1.0 / static_cast<double>(*options.grad_scale) : 1.0;
  const double norm =
      options.norm_type == NormType::kL2 ? std::sqrt(sum_of_squares) : sum_of_squares;
  decision.grad_norm = norm * decision.inv_scale;
  double limit = options.max_grad_norm;
  if (options.limit.kind != LimitKind::kFixed) {
    const double adaptive = adaptive_limit(options.limit, decision.grad_norm);
    limit = adaptive < limit ? adaptive : limit;
  }
  decision.clip_coef = clip_coefficient(limit, decision.grad_norm);
  decision.grad_factor = decision.inv_scale * decision.clip_coef;
  const bool told_to_skip = options.found_inf != nullptr && *options.found_inf != 0.0f;
  const bool finite = sum_of_squares - sum_of_squares == 0.0;  // false for inf and nan
  const bool nothing_to_do = options.only_scales && decision.grad_factor == 1.0;
  decision.skip = told_to_skip || (options.skip_nonfinite && !finite) || nothing_to_do;
  return decision;
}

// True for a factor that is too small to be a normal float32. Huge gradients and a tiny limit lead
// to such a factor.
template <class T>
FUSEDOPT_INLINE bool is_tiny(double factor) {
  return sizeof(T) == sizeof(float) && factor < 0x1p-126 && factor > 0;
}

// Multiplies a gradient by a factor that is rounded once. A tiny factor is applied in two
// multiplications, the first by a power of two.
template <class T>
FUSEDOPT_INLINE T scaled(T grad, double factor) {
  if (!is_tiny<T>(factor)) return grad * static_cast<T>(factor);
  return (grad * static_cast<T>(0x1p-126)) * static_cast<T>(factor * 0x1p126);
}

// Whether an adaptive limit takes the norm of this step into its statistics. It ignores a norm of
// 0: the limit would become 0 and clip every later norm to 0.
FUSEDOPT_INLINE bool is_to_be_observed(const StepOptions& options, const Decision& decision) {
  const bool finite = decision.grad_norm - decision.grad_norm == 0.0;
  return options.limit.kind != LimitKind::kFixed && !decision.skip && finite &&
         decision.grad_norm > 0.0;
}

FUSEDOPT_INLINE void record(StepControl& control, const Decision& decision, double sum_of_squares) {
  control.sum_of_squares = sum_of_squares;
  control.grad_norm = decision.grad_norm;
  control.clip_coef = decision.clip_coef;
  control.step_skipped = decision.skip ? 1.0 : 0.0;
  control.skipped_steps += control.step_skipped;
  control.consecutive_skips = decision.skip ? control.consecutive_skips + 1 : 0;
  control.steps += 1;
}

}  // namespace fusedopt
