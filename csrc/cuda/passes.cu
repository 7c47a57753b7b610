// This file is compiled once for each rule of rules/all.h, into an object of its own.
#include "cuda/passes.h"

#include "cuda/launch.cuh"
#include "cuda/measure.h"
#include "cuda/update.cuh"
#include "cuda/upload.h"
#include "rules/all.h"

namespace fusedopt::cuda {

namespace {

template <class Rule>
cudaError_t launch_update(const StepParams& step, const Launch& launch) {
  const Arguments<kInlinedArgs> arguments = make_arguments(step, false);
  if constexpr (Rule::kHasTrustRatio) {
    FUSEDOPT_RETURN_IF_ERROR(launch_pass<trust_kernel<Rule>>(step, launch, arguments));
  }
  return launch_pass<update_kernel<Rule>>(step, launch, arguments);
}

}  // namespace

template <class Rule>
cudaError_t update(const StepParams& step, Launch launch) {
  const DeviceScope scope(launch.device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  if (step.step_args != nullptr) FUSEDOPT_RETURN_IF_ERROR(upload_step_args(step, launch));
  return launch_update<Rule>(step, launch);
}

template <class Rule>
cudaError_t run_step(const StepParams& step, Launch launch) {
  if (!step.options.measure) return update<Rule>(step, launch);
  const DeviceScope scope(launch.device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  FUSEDOPT_RETURN_IF_ERROR(measure_and_reduce(step, launch));
  return launch_update<Rule>(step, launch);
}

template cudaError_t update<FUSEDOPT_RULE>(const StepParams&, Launch);
template cudaError_t run_step<FUSEDOPT_RULE>(const StepParams&, Launch);

}  // namespace fusedopt::cuda
