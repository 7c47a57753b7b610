#include "c/fusedopt.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "c/plan.h"

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

}  // namespace

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
                                 const int32_t* dtypes, const int32_t* groups, int64_t num_groups,
                                 int32_t on_cuda) {
  return guarded(static_cast<fusedopt_plan*>(nullptr), [&] {
    const auto tensors = tensors_of(num_tensors, sizes, dtypes, groups);
    return new fusedopt_plan(find_rule(rule), tensors, num_groups, on_cuda != 0);
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

int64_t fusedopt_device_bytes(const fusedopt_plan* plan) { return plan->device_bytes(); }

int fusedopt_enqueue_step(const fusedopt_plan* plan, const fusedopt_step* step,
                          const fusedopt_cuda* cuda) {
  return guarded(-1, [&] {
    plan->enqueue(*step, *cuda);
    return 0;
  });
}

}  // extern "C"
