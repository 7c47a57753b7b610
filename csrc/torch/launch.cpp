#include "torch/launch.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "torch/cuda_stream.h"
#include "torch/exchange.h"
#include "torch/gil.h"

namespace fusedopt {

namespace {

// To wake a thread for fewer elements costs more time than it saves. A chunk is never divided
// anyway.
constexpr int64_t kElementsPerThread = kChunkSize;

// A step over at least so many elements lets other Python threads run: it takes long enough.
constexpr int64_t kElementsToReleaseGil = 1 << 20;

int threads_for(int64_t elements) {
  if (at::in_parallel_region()) return 1;
  const int64_t worthwhile = std::max<int64_t>(1, elements / kElementsPerThread);
  return static_cast<int>(std::min<int64_t>(at::get_num_threads(), worthwhile));
}

int64_t num_elements(const DeviceTensors& tensors) {
  int64_t count = 0;
  for (size_t t = 0; t < tensors.infos.size(); ++t) {
    if (tensors.grads[t] != nullptr) count += tensors.infos[t].numel;
  }
  return count;
}

// Calls the kernels for one step.
class Launcher {
 public:
  Launcher(std::vector<DeviceTensors>& devices, const std::vector<StepParams>& steps,
           KeepAlive keep_alive)
      : devices_(devices), steps_(steps), keep_alive_(keep_alive) {}

  // Calls call(step, device) for every device. It returns a status.
  template <class Call>
  void on_all(Call call) {
    for (size_t i = 0; i < devices_.size(); ++i) on_one(devices_[i], steps_[i], call);
  }

  // Keeps all memory of the step until its end.
  void keep() {
    if (kept_.empty()) kept_ = keep_alive_();
  }

 private:
  template <class Call>
  void on_one(DeviceTensors& tensors, const StepParams& step, Call call) {
    Device device = kernels_device(tensors);
    if (tensors.on_cuda) {
      keep_for_current_stream(tensors, device.stream);
      return check_launch(call(step, device), tensors.device);
    }
    const int64_t elements = num_elements(tensors);
    device.team.threads = threads_for(elements);
    if (elements < kElementsToReleaseGil) {
      call(step, device);
      return;
    }
    keep();
    const GilRelease release;
    call(step, device);
  }

  std::vector<DeviceTensors>& devices_;
  const std::vector<StepParams>& steps_;
  KeepAlive keep_alive_;
  // Filled before other Python threads may run; kept until the end of the step.
  std::vector<c10::Storage> kept_;
};

void update_all(const RuleInfo& rule, Launcher& launcher) {
  launcher.on_all(
      [&](const StepParams& step, const Device& device) { return update(rule, step, device); });
}

}  // namespace

void launch_step(const RuleInfo& rule, std::vector<DeviceTensors>& devices,
                 const std::vector<StepParams>& steps, KeepAlive keep_alive,
                 const Exchange& exchange) {
  Launcher launcher(devices, steps, keep_alive);
  const bool one_device = devices.size() == 1;
  if (one_device && !exchange) {
    return launcher.on_all(
        [&](const StepParams& step, const Device& device) { return run_step(rule, step, device); });
  }
  if (steps[0].telemetry.params != nullptr) exchange_step_number(devices);
  const StepOptions& options = steps[0].options;
  if (options.measure) {
    launcher.on_all(measure);
    if (exchange) {
      launcher.keep();  // the exchange lets other Python threads run
      exchange_with_ranks(devices, steps, exchange);
    } else {
      exchange_norms(devices, steps[0]);
    }
  }
  update_all(rule, launcher);
  if (steps[0].chunk_coefs != nullptr && !one_device) exchange_coefs(devices);
  if (!options.measure) {
    exchange_norms(devices, steps[0]);
    control_slot(devices[0], offsetof(StepControl, grad_norm))
        .copy_(control_slot(devices[0], offsetof(StepControl, sum_of_squares)).sqrt());
  }
}

void launch_update(const RuleInfo& rule, std::vector<DeviceTensors>& devices,
                   const std::vector<StepParams>& steps, KeepAlive keep_alive) {
  Launcher launcher(devices, steps, keep_alive);
  update_all(rule, launcher);
}

bool is_known_skip(const std::vector<DeviceTensors>& devices) {
  for (const DeviceTensors& it : devices) {
    if (!it.device.is_cpu()) return false;
  }
  return static_cast<const StepControl*>(devices[0].control.const_data_ptr())->step_skipped != 0;
}

}  // namespace fusedopt
