#include "cuda/measure.h"

#include "cuda/grad_norm.cuh"
#include "cuda/launch.cuh"
#include "cuda/message.cuh"
#include "cuda/upload.h"

namespace fusedopt::cuda {

namespace {

template <class Norm, bool detailed>
cudaError_t launch_norm(const StepParams& step, const Launch& launch, bool reduces) {
  const int64_t size = StepArgs(step).bytes();
  if (size > kInlinedArgs && size <= kLargeArgs) {
    return launch_pass<grad_norm_kernel<Norm, detailed, kLargeArgs>>(
        step, launch, inlined_arguments<kLargeArgs>(step, reduces, step.step_args));
  }
  if (size > kLargeArgs) FUSEDOPT_RETURN_IF_ERROR(upload_step_args(step, launch));
  return launch_pass<grad_norm_kernel<Norm, detailed, kInlinedArgs>>(step, launch,
                                                                     make_arguments(step, reduces));
}

cudaError_t launch_norm(const StepParams& step, const Launch& launch, bool reduces) {
  const DeviceScope scope(launch.device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  if (step.options.norm_type == NormType::kInf) {
    return launch_norm<MaxAbs, false>(step, launch, reduces);
  }
  const bool detailed = step.chunk_measures != nullptr || step.part_sums != nullptr;
  return detailed ? launch_norm<SumOfSquares, true>(step, launch, reduces)
                  : launch_norm<SumOfSquares, false>(step, launch, reduces);
}

}  // namespace

cudaError_t measure_and_reduce(const StepParams& step, const Launch& launch) {
  return launch_norm(step, launch, true);
}

cudaError_t measure(const StepParams& step, Launch launch) {
  return launch_norm(step, launch, false);
}

cudaError_t reduce(const StepParams& step, Launch launch) {
  const DeviceScope scope(launch.device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  return visit_norm(step.options.norm_type, [&](auto norm) {
    return launch_kernel(reduce_kernel<decltype(norm)>, 1, launch.stream,
                         make_arguments(step, true));
  });
}

cudaError_t write_message(const StepParams& step, const bool* counted, int64_t* message,
                          Launch launch) {
  const DeviceScope scope(launch.device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  const MessageArguments arguments{step.chunk_sums, counted, step.num_chunks, message,
                                   nullptr,         nullptr, nullptr};
  return launch_kernel(write_message_kernel, 1, launch.stream, arguments);
}

cudaError_t read_message(const StepParams& step, const int64_t* total, float* skip, Launch launch) {
  const DeviceScope scope(launch.device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  const MessageArguments arguments{nullptr, nullptr, 0, nullptr, total, step.control, skip};
  return launch_kernel(read_message_kernel, 1, launch.stream, arguments);
}

}  // namespace fusedopt::cuda
