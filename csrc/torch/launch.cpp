#include "torch/launch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <pthread.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>

#include "torch/cuda_stream.h"
#include "torch/keep_alive.h"

namespace fusedopt {

namespace {

#if !defined(FUSEDOPT_CUDA_DEVICE)
#define FUSEDOPT_CUDA_DEVICE c10::kCUDA
#endif

using Hold = c10::function_ref<void()>;

// With fewer elements a thread costs more to wake than it saves; a chunk isn't divided anyway.
constexpr int64_t kElementsPerThread = kChunkSize;

// A forked child has none of its parent's threads, and GNU's OpenMP would wait for them forever.
std::atomic<bool> in_forked_child{false};
[[maybe_unused]] const int at_fork =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

// Above this many elements a step is long enough to let other Python threads run meanwhile.
constexpr int64_t kElementsToReleaseGil = 1 << 20;

int64_t num_elements(const DeviceTensors& device_tensors) {
  int64_t count = 0;
  for (size_t t = 0; t < device_tensors.tensors.size(); ++t) {
    if (device_tensors.grads[t] != nullptr) count += device_tensors.tensors[t].numel;
  }
  return count;
}

// `hold`: keeps all that the run reads and writes until it ends.
void run_on_cpu(const RuleInfo& rule, const DeviceTensors& device_tensors, const StepParams& step,
                Phases phases, Hold hold) {
  const int64_t elements = num_elements(device_tensors);
  const int64_t worthwhile = std::max<int64_t>(1, elements / kElementsPerThread);
  const int threads = at::in_parallel_region() || in_forked_child
                          ? 1
                          : static_cast<int>(std::min<int64_t>(at::get_num_threads(), worthwhile));
  const cpu::Schedule schedule{device_tensors.spans, threads};
  if (elements < kElementsToReleaseGil) return rule.run_cpu(step, schedule, phases);
  hold();
  const pybind11::gil_scoped_release release;
  rule.run_cpu(step, schedule, phases);
}

#if FUSEDOPT_WITH_CUDA
void run_on_cuda(const RuleInfo& rule, DeviceTensors& device_tensors, const StepParams& step,
                 Phases phases) {
  cuda::Launch launch{};
  launch.device = device_index(device_tensors.device);
  launch.stream = current_stream(device_tensors.device);
  launch.tickets = device_tensors.tables.tickets();
  keep_for_current_stream(device_tensors, launch.stream);
  if (const size_t bytes = cuda::step_args_bytes(step); bytes > 0) {
    launch.step_args_are_there = phases == Phases::kUpdate && device_tensors.step_args.defined();
    if (!launch.step_args_are_there) {
      device_tensors.step_args = at::empty(
          {static_cast<int64_t>(bytes)}, at::TensorOptions(device_tensors.device).dtype(at::kByte));
    }
    launch.step_args = device_tensors.step_args.data_ptr();
  }
  check_launch(rule.run_cuda(step, launch, phases), device_tensors.device);
  if (phases != Phases::kMeasure) device_tensors.step_args.reset();
}
#endif

void run_one(const RuleInfo& rule, DeviceTensors& device_tensors, const StepParams& step,
             Phases phases, Hold hold) {
#if FUSEDOPT_WITH_CUDA
  if (device_tensors.on_cuda) return run_on_cuda(rule, device_tensors, step, phases);
#endif
  run_on_cpu(rule, device_tensors, step, phases, hold);
}

at::Tensor sum_of(const DeviceTensors& device_tensors) {
  return control_slot(device_tensors, offsetof(StepControl, sum_of_squares));
}

// What each device has measured becomes what all have, combined in the order of the devices.
void combine_devices(std::vector<DeviceTensors>& devices, NormType norm_type) {
  at::Tensor total = sum_of(devices[0]).clone();
  for (size_t i = 1; i < devices.size(); ++i) {
    const at::Tensor other = sum_of(devices[i]).to(total.device());
    total = norm_type == NormType::kL2 ? total.add(other) : total.maximum(other);
  }
  for (DeviceTensors& device_tensors : devices) sum_of(device_tensors).copy_(total);
}

// Each device knows the smallest coefficient of its own tensors or units; readings are of all.
void combine_coefs(std::vector<DeviceTensors>& devices) {
  const at::Tensor smallest = control_slot(devices[0], offsetof(StepControl, clip_coef));
  for (size_t i = 1; i < devices.size(); ++i) {
    const at::Tensor other =
        control_slot(devices[i], offsetof(StepControl, clip_coef)).to(smallest.device());
    smallest.copy_(at::where(other.lt(smallest), other, smallest));
  }
  const at::Tensor& ring = devices[0].step_ring;
  if (!ring.defined()) return;
  const at::Tensor steps = control_slot(devices[0], offsetof(StepControl, steps));
  const at::Tensor row = steps.sub(1).remainder(ring.size(0)).to(at::kLong);
  ring.select(1, 1).index_copy_(0, row, smallest);
}

// The plan's own controls count from when it was made, and telemetry's rows from the first step.
void share_step_number(std::vector<DeviceTensors>& devices) {
  const at::Tensor steps = control_slot(devices[0], offsetof(StepControl, steps));
  for (size_t i = 1; i < devices.size(); ++i) {
    control_slot(devices[i], offsetof(StepControl, steps)).copy_(steps);
  }
}

}  // namespace

void run(const RuleInfo& rule, std::vector<DeviceTensors>& devices,
         const std::vector<StepParams>& passes, Phases phases, KeepAlive keep_alive) {
  // From the first time that other Python threads may run, and between the phases as well.
  std::vector<c10::Storage> alive;
  const auto hold = [&] {
    if (alive.empty()) alive = keep_alive();
  };
  if (devices.size() == 1) return run_one(rule, devices[0], passes[0], phases, hold);
  const auto run_all = [&](Phases phase) {
    for (size_t i = 0; i < passes.size(); ++i) {
      run_one(rule, devices[i], passes[i], phase, hold);
    }
  };
  if (passes[0].telemetry.chunks != nullptr) share_step_number(devices);
  const StepOptions& options = passes[0].options;
  if (options.measure && phases != Phases::kUpdate) {
    run_all(Phases::kMeasure);
    combine_devices(devices, options.norm_type);
  }
  if (phases == Phases::kMeasure) return;
  run_all(Phases::kUpdate);
  if (passes[0].own_clips.units != nullptr) combine_coefs(devices);
  if (!options.measure) {
    combine_devices(devices, options.norm_type);
    control_slot(devices[0], offsetof(StepControl, grad_norm)).copy_(sum_of(devices[0]).sqrt());
  }
}

at::Tensor control_slot(const DeviceTensors& device_tensors, size_t offset) {
  return device_tensors.control.narrow(0, static_cast<int64_t>(offset / sizeof(double)), 1);
}

bool built_with_cuda() { return FUSEDOPT_WITH_CUDA != 0; }

c10::DeviceType cuda_device_type() { return FUSEDOPT_CUDA_DEVICE; }

}  // namespace fusedopt
