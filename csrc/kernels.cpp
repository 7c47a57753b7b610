#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "core/coefficients.h"
#include "cpu/isa.h"
#include "cpu/passes.h"
#include "rules/all.h"
#if FUSEDOPT_WITH_CUDA
#include "cuda/passes.h"
#include "cuda/shared_count.h"
#endif

namespace fusedopt {

namespace {

#if FUSEDOPT_WITH_CUDA
cuda::Launch launch_on(const Device& device) {
  return {device.index, static_cast<cudaStream_t>(device.stream)};
}
#endif

template <class Rule>
int update_with(const StepParams& step, const Device& device) {
#if FUSEDOPT_WITH_CUDA
  if (device.is_cuda) return cuda::update<Rule>(step, launch_on(device));
#endif
  cpu::update<Rule>(step, device.team);
  return 0;
}

template <class Rule>
int run_step_with(const StepParams& step, const Device& device) {
#if FUSEDOPT_WITH_CUDA
  if (device.is_cuda) return cuda::run_step<Rule>(step, launch_on(device));
#endif
  cpu::run_step<Rule>(step, device.team);
  return 0;
}

template <class Rule>
std::vector<OptionInfo> options_of() {
  std::vector<OptionInfo> options;
  if constexpr (num_hyperparameters<Rule> > 0) {
    typename Rule::Hyperparameters h{};
    const double* const begin = reinterpret_cast<const double*>(&h);
    for (const auto& option : Rule::kHyperparameters) {
      const int first = static_cast<int>(&(h.*option.first) - begin);
      options.push_back(
          {option.name, first, option.count, option.on_host, option.any_sign, option.optional});
    }
  }
  return options;
}

template <class Rule>
RuleInfo describe() {
  RuleInfo info;
  info.name = Rule::kName;
  info.options = options_of<Rule>();
  info.scalars.assign(std::begin(Rule::kScalars), std::end(Rule::kScalars));
  info.states.assign(std::begin(Rule::kStates), std::end(Rule::kStates));
  info.num_hyperparameters = num_hyperparameters<Rule>;
  info.has_trust_ratio = Rule::kHasTrustRatio;
  info.states_used = [](const double* values) {
    return Rule::states_used(hyperparameters<Rule>(values, Group{}));
  };
  info.update = update_with<Rule>;
  info.run_step = run_step_with<Rule>;
  return info;
}

// Refuses a step whose tables or memory this rule, device or limit would read wrongly.
void check(const RuleInfo& rule, const StepParams& step, const Device& device) {
  const auto expect = [&](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(rule.name + ": the step was laid out for " + what);
  };
  const size_t pointers = 2 + rule.states.size() + rule.scalars.size();
  expect(step.num_pointers == static_cast<int64_t>(pointers) &&
             step.num_hyperparameters == rule.num_hyperparameters &&
             (step.trust_sums != nullptr || !rule.has_trust_ratio),
         "another rule");
  // Only the CPU takes chunks by spans.
  expect(step.num_chunks == 0 || (step.num_spans == 0) == device.is_cuda,
         "the other kind of device");
  const SegmentKind segments = segment_kind(step.options.limit.kind);
  expect(segments == SegmentKind::kNone || step.chunk_coefs != nullptr, "another limit");
  expect(segments != SegmentKind::kRows || step.part_sums != nullptr, "another limit");
}

}  // namespace

bool in_range(const OptionInfo& option, double number) {
  if (option.any_sign) return true;
  return number >= 0 && (option.count == 1 || number < 1);
}

const std::vector<RuleInfo>& all_rules() {
#define FUSEDOPT_DESCRIBE(Rule) describe<Rule>(),
  static const std::vector<RuleInfo> rules{FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_DESCRIBE)};
#undef FUSEDOPT_DESCRIBE
  return rules;
}

const RuleInfo& find_rule(const std::string& name) {
  for (const RuleInfo& rule : all_rules()) {
    if (rule.name == name) return rule;
  }
  throw std::invalid_argument("no rule is called " + name);
}

int measure(const StepParams& step, const Device& device) {
#if FUSEDOPT_WITH_CUDA
  if (device.is_cuda) return cuda::measure(step, launch_on(device));
#endif
  cpu::measure(step, device.team);
  return 0;
}

int reduce(const StepParams& step, [[maybe_unused]] const Device& device) {
#if FUSEDOPT_WITH_CUDA
  if (device.is_cuda) return cuda::reduce(step, launch_on(device));
#endif
  cpu::reduce(step);
  return 0;
}

int write_message(const StepParams& step, const bool* counted, int64_t* message,
                  [[maybe_unused]] const Device& device) {
#if FUSEDOPT_WITH_CUDA
  if (device.is_cuda) return cuda::write_message(step, counted, message, launch_on(device));
#endif
  cpu::write_message(step, counted, message);
  return 0;
}

int read_message(const StepParams& step, const int64_t* total, float* skip,
                 [[maybe_unused]] const Device& device) {
#if FUSEDOPT_WITH_CUDA
  if (device.is_cuda) return cuda::read_message(step, total, skip, launch_on(device));
#endif
  uint64_t limbs[kLimbs];
  std::copy_n(total, kLimbs, limbs);
  read_message(total, limbs, &step.control->sum_of_squares, skip);
  return 0;
}

int update(const RuleInfo& rule, const StepParams& step, const Device& device) {
  check(rule, step, device);
  return rule.update(step, device);
}

int run_step(const RuleInfo& rule, const StepParams& step, const Device& device) {
  check(rule, step, device);
  return rule.run_step(step, device);
}

int upload([[maybe_unused]] const Device& device, void* to, const void* from, size_t bytes) {
#if FUSEDOPT_WITH_CUDA
  if (device.is_cuda) return cuda::upload(launch_on(device), to, from, bytes);
#endif
  if (bytes > 0) memcpy(to, from, bytes);
  return 0;
}

#if FUSEDOPT_WITH_CUDA

int spread_count(const SharedCount& count, const SharedScalars& scalars, int64_t num_tensors,
                 const Device& device) {
  return cuda::spread_count(count.steps, scalars, num_tensors, launch_on(device));
}

int collect_count(const StepControl& control, const SharedCount& count, const Device& device) {
  return cuda::collect_count(control, count, launch_on(device));
}

#else

int spread_count(const SharedCount&, const SharedScalars&, int64_t, const Device&) {
  throw std::invalid_argument("a shared count needs CUDA");
}

int collect_count(const StepControl&, const SharedCount&, const Device&) {
  throw std::invalid_argument("a shared count needs CUDA");
}

#endif

bool built_with_cuda() { return FUSEDOPT_WITH_CUDA != 0; }

#if FUSEDOPT_WITH_CUDA

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

std::string error_name(int status) {
  const cudaError_t error = static_cast<cudaError_t>(status);
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

#else

bool is_capturing(void*) { return false; }

std::string error_name(int status) { return "error " + std::to_string(status); }

#endif

const char* cpu_isa() { return cpu::isa_name(cpu::best_isa()); }

}  // namespace fusedopt
