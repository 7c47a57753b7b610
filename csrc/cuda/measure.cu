#include "cuda/measure.h"

#include "cuda/grad_norm.cuh"
#include "cuda/launch.cuh"
#include "cuda/upload.h"

namespace fusedopt::cuda {

namespace {

template <class Norm, bool detailed>
cudaError_t measure_as(const Pass& pass, const Launch& launch) {
  unsigned* ticket = launch.tickets;
  const size_t size = total_bytes(pass);
  if (size > kSmall && size <= kLarge) {
    return launch_pass<grad_norm_kernel<Norm, detailed, kLarge>>(
        launch, make_arguments<kLarge>(pass, ticket, nullptr, launch.moving));
  }
  if (size > kLarge) FUSEDOPT_RETURN_IF_ERROR(upload_moving(pass, launch));
  return launch_pass<grad_norm_kernel<Norm, detailed, kSmall>>(
      launch, make_arguments<kSmall>(pass, ticket, launch.moving, nullptr));
}

}  // namespace

cudaError_t measure(const Pass& pass, const Launch& launch) {
  if (pass.options.norm_type == NormType::kInf) return measure_as<Largest, false>(pass, launch);
  const bool detailed = pass.telemetry.chunks != nullptr || pass.own_clips.units != nullptr;
  return detailed ? measure_as<SumOfSquares, true>(pass, launch)
                  : measure_as<SumOfSquares, false>(pass, launch);
}

}  // namespace fusedopt::cuda
