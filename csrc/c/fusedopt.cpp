#include <algorithm>
#include <cstring>
#include <memory>
#include <sstream>
#include <stdexcept>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels.h"

// After kernels.h, which says how functions are exported.
#include "c/fusedopt.h"

namespace {

using namespace fusedopt;

thread_local std::string last_error;

// Calls body(), and turns an exception into `failure` and a message.
template <class Result, class Body>
Result guarded(Result failure, Body body) {
  try {
    return body();
  } catch (const std::exception& error) {
    last_error = error.what();
    return failure;
  }
}

struct Dtype {
  const char* name;
  Storage storage;
};
constexpr Dtype kDtypes[] = {{"float32", Storage::kFloat32},
                             {"float64", Storage::kFloat64},
                             {"bfloat16", Storage::kBFloat16},
                             {"float16", Storage::kFloat16}};
static_assert(FUSEDOPT_FLOAT64 == 1 && FUSEDOPT_BFLOAT16 == 2 && FUSEDOPT_FLOAT16 == 3);
static_assert(sizeof(fusedopt_control) == sizeof(StepControl));
static_assert(FUSEDOPT_MESSAGE_SIZE == kMessageSize);

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

// Throws if a number is out of range.
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

template <class Items, class Value>
void write_object(std::ostream& text, const char* name, const Items& items, Value value) {
  text << '"' << name << "\": {";
  std::string seen;
  for (const auto& item : items) {
    const std::string key = '"' + std::string(item.name) + "\": ";
    if (seen.find(key) != std::string::npos) continue;
    text << (seen.empty() ? "" : ", ") << key << value(item);
    seen += key;
  }
  text << '}';
}

template <class Names, class Name>
void write_list(std::ostream& text, const char* name, const Names& items, Name name_of) {
  text << '"' << name << "\": [";
  const char* separator = "";
  for (const auto& item : items) {
    text << separator << '"' << name_of(item) << '"';
    separator = ", ";
  }
  text << ']';
}

std::string describe() {
  const auto first_value = [](const StateName& state) { return state.first_value; };
  std::ostringstream text;
  text << "{\"rules\": {";
  const char* separator = "";
  for (const RuleInfo& rule : all_rules()) {
    text << separator << '"' << rule.name << "\": {";
    write_object(text, "options", rule.options, [](const OptionInfo& it) { return it.count; });
    text << ", ";
    write_object(text, "scalars", rule.scalars, first_value);
    text << ", ";
    write_object(text, "states", rule.states, first_value);
    text << '}';
    separator = ", ";
  }
  text << "}, ";
  write_list(text, "dtypes", kDtypes, [](const Dtype& it) { return it.name; });
  text << ", ";
  write_list(text, "control", kControlFields, [](const char* it) { return it; });
  text << ", \"step_bytes\": " << sizeof(fusedopt_step);
  text << ", \"message_size\": " << FUSEDOPT_MESSAGE_SIZE << '}';
  return text.str();
}

int count_of_numbers(const RuleInfo& rule) {
  int count = 0;
  for (const OptionInfo& option : rule.options) {
    count = std::max(count, place_of(rule, option.name) + option.count);
  }
  return count;
}

std::vector<TensorInfo> tensors_of(int64_t count, const int64_t* sizes, const int32_t* dtypes,
                                   const int32_t* groups) {
  std::vector<TensorInfo> result;
  for (int64_t i = 0; i < count; ++i) {
    TensorInfo info{};
    if (dtypes[i] < 0 || dtypes[i] >= static_cast<int32_t>(std::size(kDtypes))) {
      throw std::invalid_argument("tensor " + std::to_string(i) + " has an unknown dtype");
    }
    info.numel = sizes[i];
    info.row_size = std::max<int64_t>(1, sizes[i]);
    info.number = static_cast<uint32_t>(i);
    info.group = groups == nullptr ? 0 : static_cast<uint32_t>(groups[i]);
    info.param = info.grad = kDtypes[dtypes[i]].storage;
    std::fill(std::begin(info.states), std::end(info.states), info.param);
    result.push_back(info);
  }
  return result;
}

Needs needs_of(const RuleInfo& rule, int64_t num_groups) {
  Needs needs{};
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

struct fusedopt_plan {
  fusedopt_plan(const RuleInfo& its_rule, const std::vector<TensorInfo>& tensors, int64_t groups)
      : rule(its_rule), num_groups(groups), layout(tensors, needs_of(its_rule, groups)) {}

  void step(const fusedopt_step& call);
  void measure(const fusedopt_step& call, const uint8_t* counted, int64_t* message);

 private:
  StepParams bind(const fusedopt_step& call);
  Device device_for(const fusedopt_step& call) const;
  void place(void* const* arrays);
  std::vector<double> groups_of(const double* options) const;
  int threads_for(const fusedopt_step& call) const;

  const RuleInfo& rule;
  const int64_t num_groups;
  const Layout layout;
  std::vector<double> workspace;
  std::vector<void*> placed;  // the addresses in the workspace's tables
};

void fusedopt_plan::place(void* const* arrays) {
  const size_t states = rule.states.size(), scalars = rule.scalars.size();
  if (!workspace.empty() && std::equal(placed.begin(), placed.end(), arrays)) return;
  std::vector<TensorPointers> pointers(layout.shapes().size());
  void* const* next = arrays;
  for (TensorPointers& it : pointers) {
    it.param = *next++;
    for (size_t k = 0; k < states; ++k) it.states[k] = *next++;
    for (size_t k = 0; k < scalars; ++k) it.scalars[k] = static_cast<float*>(*next++);
  }
  const std::vector<char> tables = layout.tables(pointers);
  workspace.resize(layout.bytes() / sizeof(double));
  placed.assign(arrays, static_cast<void* const*>(next));
  upload(Device(), workspace.data(), tables.data(), tables.size());
}

int fusedopt_plan::threads_for(const fusedopt_step& call) const {
  int64_t elements = 0;
  for (size_t t = 0; t < layout.shapes().size(); ++t) {
    if (call.grads[t] != nullptr) elements += layout.shapes()[t].numel;
  }
  const int64_t allowed = call.threads > 0 ? call.threads : most_threads();
  return static_cast<int>(std::clamp<int64_t>(elements / kChunkSize, 1, allowed));
}

// All groups, and then the hyperparameters of all groups.
std::vector<double> fusedopt_plan::groups_of(const double* options) const {
  std::vector<double> result(num_groups * sizeof(Group) / sizeof(double));
  for (int64_t g = 0; g < num_groups; ++g) {
    const auto numbers = hyperparameters_of(rule, options + g * count_of_numbers(rule));
    result.insert(result.end(), numbers.begin(), numbers.end());
    reinterpret_cast<Group*>(result.data())[g].states_used = rule.states_used(numbers.data());
  }
  return result;
}

StepParams fusedopt_plan::bind(const fusedopt_step& call) {
  StepParams step{};
  layout.bind(reinterpret_cast<char*>(workspace.data()), step);
  step.grads = call.grads;
  step.control = reinterpret_cast<StepControl*>(call.control);
  step.options.max_grad_norm = call.max_grad_norm;
  step.options.measure = call.measure != 0 || call.total != nullptr;
  step.options.skip_nonfinite = call.skip_nonfinite != 0;
  step.options.grad_scale = call.grad_scale;
  step.options.found_inf = call.found_inf;
  return step;
}

Device fusedopt_plan::device_for(const fusedopt_step& call) const {
  Device device;
  device.team = {threads_for(call), {call.pool.pool, call.pool.schedule}};
  return device;
}

void fusedopt_plan::step(const fusedopt_step& call) {
  const std::vector<double> groups = groups_of(call.options);
  place(call.arrays);
  StepParams step = bind(call);
  step.groups = reinterpret_cast<const Group*>(groups.data());
  const Device device = device_for(call);
  if (call.total == nullptr) {
    run_step(rule, step, device);
    return;
  }
  float skip = 0;  // the total says so if any rank has found_inf
  read_message(step, call.total, &skip, device);
  step.options.found_inf = &skip;
  update(rule, step, device);
}

void fusedopt_plan::measure(const fusedopt_step& call, const uint8_t* counted, int64_t* message) {
  const size_t per_tensor = 1 + rule.states.size() + rule.scalars.size();
  const std::vector<void*> no_arrays(layout.shapes().size() * per_tensor);
  place(no_arrays.data());
  const StepParams step = bind(call);
  const Device device = device_for(call);
  fusedopt::measure(step, device);

  const std::unique_ptr<bool[]> chunks(new bool[layout.num_chunks()]);
  for (size_t t = 0; t < layout.shapes().size(); ++t) {
    const TensorShape& shape = layout.shapes()[t];
    std::fill_n(&chunks[shape.first_chunk], chunks_of(shape.numel), counted[t] != 0);
  }
  std::fill_n(message, kMessageSize, 0);
  write_message(step, chunks.get(), message, device);
  message[kFoundInf] = call.found_inf != nullptr && *call.found_inf != 0 ? 1 : 0;
  message[kRanks] = 1;
}

extern "C" {

const char* fusedopt_error() { return last_error.c_str(); }

const char* fusedopt_describe() {
  static const std::string text = describe();
  return text.c_str();
}

int64_t fusedopt_states_used(const char* rule, const double* options) {
  return guarded(int64_t{-1}, [&]() -> int64_t {
    const RuleInfo& info = find_rule(rule);
    return info.states_used(hyperparameters_of(info, options).data());
  });
}

fusedopt_plan* fusedopt_new_plan(const char* rule, int64_t num_tensors, const int64_t* sizes,
                                 const int32_t* dtypes, const int32_t* groups, int64_t num_groups) {
  return guarded(static_cast<fusedopt_plan*>(nullptr), [&] {
    const auto tensors = tensors_of(num_tensors, sizes, dtypes, groups);
    return new fusedopt_plan(find_rule(rule), tensors, num_groups);
  });
}

void fusedopt_free_plan(fusedopt_plan* plan) { delete plan; }

int fusedopt_take_step(fusedopt_plan* plan, const fusedopt_step* step) {
  return guarded(-1, [&] {
    plan->step(*step);
    return 0;
  });
}

int fusedopt_measure(fusedopt_plan* plan, const fusedopt_step* step, const uint8_t* counted,
                     int64_t* message) {
  return guarded(-1, [&] {
    plan->measure(*step, counted, message);
    return 0;
  });
}

}  // extern "C"
