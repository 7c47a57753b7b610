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
cudaError_t update(const StepParams& step, const Launch& launch) {
  if (launch.step_args != nullptr && !launch.step_args_are_there) {
    FUSEDOPT_RETURN_IF_ERROR(upload_step_args(step, launch));
  }
  return launch_pass<update_kernel<Rule>>(
      launch, make_arguments<kSmall>(step, launch.tickets + 1, launch.step_args, nullptr));
}

}  // namespace

template <class Rule>
cudaError_t run(const StepParams& step, Launch launch, Phases phases) {
  const DeviceScope scope(launch.device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  if (phases != Phases::kUpdate && step.options.measure) {
    FUSEDOPT_RETURN_IF_ERROR(measure(step, launch));
    launch.step_args_are_there = true;
  }
  return phases == Phases::kMeasure ? cudaSuccess : update<Rule>(step, launch);
}

template cudaError_t run<FUSEDOPT_RULE>(const StepParams&, Launch, Phases);

}  // namespace fusedopt::cuda
