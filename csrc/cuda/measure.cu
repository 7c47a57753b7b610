#include "measure.h"

#include "grad_norm.cuh"
#include "launch.cuh"
#include "upload.h"

namespace fusedopt::cuda {

namespace {

template <class Norm>
cudaError_t measure_as(const Pass& pass, const Launch& launch) {
  unsigned* ticket = launch.tickets;
  const size_t size = total_bytes(pass);
  if (size > kSmall && size <= kLarge) {
    return launch_pass<grad_norm_kernel<Norm, kLarge>>(
        launch, make_arguments<kLarge>(pass, ticket, nullptr, launch.moving));
  }
  if (size > kLarge) FUSEDOPT_RETURN_IF_ERROR(upload_moving(pass, launch));
  return launch_pass<grad_norm_kernel<Norm, kSmall>>(
      launch, make_arguments<kSmall>(pass, ticket, launch.moving, nullptr));
}

}  // namespace

cudaError_t measure(const Pass& pass, const Launch& launch) {
  return visit_norm(pass.options.norm_type,
                    [&](auto norm) { return measure_as<decltype(norm)>(pass, launch); });
}

}  // namespace fusedopt::cuda
