#include "cuda/measure.h"

#include "cuda/grad_norm.cuh"
#include "cuda/launch.cuh"
#include "cuda/upload.h"

namespace fusedopt::cuda {

namespace {

template <class Norm, bool detailed>
cudaError_t measure_as(const StepParams& step, const Launch& launch) {
  unsigned* ticket = launch.tickets;
  const size_t size = total_bytes(step);
  if (size > kSmall && size <= kLarge) {
    return launch_pass<grad_norm_kernel<Norm, detailed, kLarge>>(
        launch, make_arguments<kLarge>(step, ticket, nullptr, launch.step_args));
  }
  if (size > kLarge) FUSEDOPT_RETURN_IF_ERROR(upload_step_args(step, launch));
  return launch_pass<grad_norm_kernel<Norm, detailed, kSmall>>(
      launch, make_arguments<kSmall>(step, ticket, launch.step_args, nullptr));
}

}  // namespace

cudaError_t measure(const StepParams& step, const Launch& launch) {
  if (step.options.norm_type == NormType::kInf) return measure_as<MaxAbs, false>(step, launch);
  const bool detailed = step.telemetry.chunks != nullptr || step.own_clips.units != nullptr;
  return detailed ? measure_as<SumOfSquares, true>(step, launch)
                  : measure_as<SumOfSquares, false>(step, launch);
}

}  // namespace fusedopt::cuda
