#include "c/plan.h"

#include <algorithm>
#include <memory>
#include <sstream>
#include <stdexcept>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fusedopt {

namespace {

// The place of an option's numbers among those of all options. Two entries of a rule may have one
// name: the rule then reads the same numbers in two ways.
int place_of(const RuleInfo& rule, const std::string& name) {
  int place = 0;
  for (auto it = rule.options.begin(); it->name != name; ++it) {
    const bool is_first = std::none_of(
        rule.options.begin(), it, [&](const OptionInfo& other) { return other.name == it->name; });
    if (is_first) place += it->count;
  }
  return place;
}

// How many numbers all options of a rule have together.
int count_of_numbers(const RuleInfo& rule) {
  int count = 0;
  for (const OptionInfo& option : rule.options) {
    count = std::max(count, place_of(rule, option.name) + option.count);
  }
  return count;
}

Needs needs_of(const RuleInfo& rule, int64_t num_groups, bool on_cuda) {
  Needs needs{};
  needs.on_cuda = on_cuda;
  needs.trust_ratio = rule.has_trust_ratio;
  needs.num_groups = num_groups;
  needs.num_hyperparameters = rule.num_hyperparameters;
  needs.num_states = static_cast<int>(rule.states.size());
  needs.num_scalars = static_cast<int>(rule.scalars.size());
  return needs;
}

int most_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace

std::vector<double> hyperparameters_of(const RuleInfo& rule, const double* options) {
  std::vector<double> result(rule.num_hyperparameters);
  for (const OptionInfo& option : rule.options) {
    const int place = place_of(rule, option.name);
    for (int k = 0; k < option.count; ++k) {
      const double number = options[place + k];
      if (!in_range(option, number)) {
        std::ostringstream text;
        text << "Invalid " << option.name << " value: " << number << "; expected a number "
             << (option.count == 1 ? ">= 0" : "in [0, 1)");
        throw std::invalid_argument(text.str());
      }
      result[option.first + k] = option.on_host != nullptr ? option.on_host(number) : number;
    }
  }
  return result;
}

}  // namespace fusedopt

using namespace fusedopt;

fusedopt_plan::fusedopt_plan(const RuleInfo& rule, const std::vector<TensorInfo>& tensors,
                             int64_t num_groups, bool on_cuda)
    : rule_(rule), num_groups_(num_groups), layout_(tensors, needs_of(rule, num_groups, on_cuda)) {
  if (on_cuda && !built_with_cuda()) {
    throw std::invalid_argument("fusedopt is compiled without its CUDA kernels");
  }
}

size_t fusedopt_plan::num_arrays() const {
  return layout_.shapes().size() * (1 + rule_.states.size() + rule_.scalars.size());
}

std::vector<TensorPointers> fusedopt_plan::pointers_to(void* const* arrays) const {
  std::vector<TensorPointers> pointers(layout_.shapes().size());
  for (TensorPointers& it : pointers) {
    it.param = *arrays++;
    for (size_t k = 0; k < rule_.states.size(); ++k) it.states[k] = *arrays++;
    for (size_t k = 0; k < rule_.scalars.size(); ++k) {
      it.scalars[k] = static_cast<float*>(*arrays++);
    }
  }
  return pointers;
}

// All groups, and then the hyperparameters of all groups.
std::vector<double> fusedopt_plan::groups_of(const double* options) const {
  std::vector<double> result(num_groups_ * sizeof(Group) / sizeof(double));
  for (int64_t g = 0; g < num_groups_; ++g) {
    const auto numbers = hyperparameters_of(rule_, options + g * count_of_numbers(rule_));
    result.insert(result.end(), numbers.begin(), numbers.end());
    reinterpret_cast<Group*>(result.data())[g].states_used = rule_.states_used(numbers.data());
  }
  return result;
}

StepParams fusedopt_plan::bind(char* memory, const fusedopt_step& call) const {
  StepParams step{};
  layout_.bind(memory, step);
  step.grads = call.grads;
  step.control = reinterpret_cast<StepControl*>(call.control);
  step.options.max_grad_norm = call.max_grad_norm;
  step.options.measure = call.measure != 0 || call.total != nullptr;
  step.options.skip_nonfinite = call.skip_nonfinite != 0;
  step.options.grad_scale = call.grad_scale;
  step.options.found_inf = call.found_inf;
  return step;
}

int fusedopt_plan::threads_for(const fusedopt_step& call) const {
  int64_t elements = 0;
  for (size_t t = 0; t < layout_.shapes().size(); ++t) {
    if (call.grads[t] != nullptr) elements += layout_.shapes()[t].numel;
  }
  const int64_t allowed = call.threads > 0 ? call.threads : most_threads();
  return static_cast<int>(std::clamp<int64_t>(elements / kChunkSize, 1, allowed));
}

Device fusedopt_plan::host(const fusedopt_step& call) const {
  Device device;
  device.team = {threads_for(call), {call.pool.pool, call.pool.schedule}};
  return device;
}

void fusedopt_plan::place(void* const* arrays) {
  if (!workspace_.empty() && std::equal(placed_.begin(), placed_.end(), arrays)) return;
  const std::vector<char> tables = layout_.tables(pointers_to(arrays));
  workspace_.resize(layout_.bytes() / sizeof(double));
  placed_.assign(arrays, arrays + num_arrays());
  upload(Device(), workspace_.data(), tables.data(), tables.size());
}

void fusedopt_plan::step(const fusedopt_step& call) {
  const std::vector<double> groups = groups_of(call.options);
  place(call.arrays);
  StepParams step = bind(reinterpret_cast<char*>(workspace_.data()), call);
  step.groups = reinterpret_cast<const Group*>(groups.data());
  const Device device = host(call);
  if (call.total == nullptr) {
    run_step(rule_, step, device);
    return;
  }
  float skip = 0;  // the total says so if any rank has found_inf
  read_message(step, call.total, &skip, device);
  step.options.found_inf = &skip;
  update(rule_, step, device);
}

void fusedopt_plan::measure(const fusedopt_step& call, const uint8_t* counted, int64_t* message) {
  const std::vector<void*> no_arrays(num_arrays());
  place(no_arrays.data());
  const StepParams step = bind(reinterpret_cast<char*>(workspace_.data()), call);
  const Device device = host(call);
  fusedopt::measure(step, device);

  const std::unique_ptr<bool[]> chunks(new bool[layout_.num_chunks()]);
  for (size_t t = 0; t < layout_.shapes().size(); ++t) {
    const TensorShape& shape = layout_.shapes()[t];
    std::fill_n(&chunks[shape.first_chunk], chunks_of(shape.numel), counted[t] != 0);
  }
  std::fill_n(message, kMessageSize, 0);
  write_message(step, chunks.get(), message, device);
  message[kFoundInf] = call.found_inf != nullptr && *call.found_inf != 0 ? 1 : 0;
  message[kRanks] = 1;
}

// The memory of a step on a device: the workspace, the control, the scalars of all tensors.
int64_t fusedopt_plan::device_bytes() const {
  const size_t scalars = layout_.shapes().size() * rule_.scalars.size();
  return layout_.bytes() + static_cast<int64_t>(sizeof(StepControl) + scalars * sizeof(float));
}

void fusedopt_plan::enqueue(const fusedopt_step& call, const fusedopt_cuda& cuda) const {
  const int num_scalars = static_cast<int>(rule_.scalars.size());
  std::vector<double> groups = groups_of(call.options);
  for (int64_t g = 0; g < num_groups_; ++g) {
    Group& group = reinterpret_cast<Group*>(groups.data())[g];
    group.lr = cuda.lr[g];
    group.lr_storage = Storage::kFloat32;
  }
  const Device device{true, cuda.device, cuda.stream, {}};
  const auto enqueued = [](int status) {
    if (status != 0) throw std::runtime_error("CUDA: " + error_name(status));
  };

  char* const memory = static_cast<char*>(cuda.memory);
  auto* const control = reinterpret_cast<StepControl*>(memory + layout_.bytes());
  float* scalars = reinterpret_cast<float*>(control + 1);
  const SharedCount count{cuda.count, cuda.skips, cuda.grad_norm};
  enqueued(
      spread_count(count, {cuda.factors, num_scalars, scalars}, layout_.shapes().size(), device));
  std::vector<TensorPointers> pointers = pointers_to(call.arrays);
  for (TensorPointers& it : pointers) {
    for (int k = 0; k < num_scalars; ++k) it.scalars[k] = scalars++;
  }
  const std::vector<char> tables = layout_.tables(pointers);
  enqueued(upload(device, memory, tables.data(), tables.size()));
  const StepControl nothing{};
  enqueued(upload(device, control, &nothing, sizeof(nothing)));

  StepParams step = bind(memory, call);
  step.groups = reinterpret_cast<const Group*>(groups.data());
  step.control = control;
  enqueued(run_step(rule_, step, device));
  enqueued(collect_count(*control, count, device));
}
