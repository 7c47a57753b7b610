// Compiled once per rule of ../rules.h: each is an object of its own.
#include "cuda/passes.h"

#include "cuda/launch.cuh"
#include "cuda/measure.h"
#include "cuda/update.cuh"
#include "cuda/upload.h"
#include "rules/all.h"

namespace fusedopt::cuda {

namespace {

template <class Rule>
cudaError_t update(const Pass& pass, const Launch& launch) {
  if (launch.moving != nullptr && !launch.moving_is_there) {
    FUSEDOPT_RETURN_IF_ERROR(upload_moving(pass, launch));
  }
  return launch_pass<update_kernel<Rule>>(
      launch, make_arguments<kSmall>(pass, launch.tickets + 1, launch.moving, nullptr));
}

}  // namespace

template <class Rule>
cudaError_t run(const Pass& pass, Launch launch, Phases phases) {
  const DeviceScope scope(launch.device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  if (phases != Phases::kUpdate && pass.options.measure) {
    FUSEDOPT_RETURN_IF_ERROR(measure(pass, launch));
    launch.moving_is_there = true;
  }
  return phases == Phases::kMeasure ? cudaSuccess : update<Rule>(pass, launch);
}

template cudaError_t run<FUSEDOPT_RULE>(const Pass&, Launch, Phases);

}  // namespace fusedopt::cuda
