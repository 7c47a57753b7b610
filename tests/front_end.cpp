// A front end of its own: SGD clips and updates four floats, without torch or Python. It prints the
// results, then the refusals of steps that were laid out wrongly.
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "kernels.h"

using namespace fusedopt;

namespace {

struct Model {
  float params[4] = {1, 2, 3, 4}, grads[4] = {1, 1, 1, 1};
  float steps = 0;  // the rule's counter
};

TensorInfo describe(const Model&) {
  TensorInfo info{};
  info.numel = info.row_size = 4;
  info.param = info.grad = Storage::kFloat32;
  for (Storage& state : info.states) state = Storage::kFloat32;
  return info;
}

Needs needs_of(const RuleInfo& rule) {
  Needs needs{};
  needs.num_groups = 1;
  needs.num_hyperparameters = rule.num_hyperparameters;
  needs.num_states = static_cast<int>(rule.states.size());
  needs.num_scalars = static_cast<int>(rule.scalars.size());
  return needs;
}

// The group, followed by its hyperparameters: lr is 0.5, and all others are 0.
std::vector<double> make_groups(const RuleInfo& rule) {
  constexpr int kFirst = sizeof(Group) / sizeof(double);
  std::vector<double> groups(kFirst + rule.num_hyperparameters);
  for (const OptionInfo& it : rule.options) {
    if (it.name == "lr") groups[kFirst + it.first] = 0.5;
  }
  Group* const group = reinterpret_cast<Group*>(groups.data());
  group->states_used = rule.states_used(groups.data() + kFirst);
  return groups;
}

// Calls body(), and prints the message if it refuses.
template <class Body>
void expect_refusal(Body body) {
  try {
    body();
    std::printf("not refused\n");
  } catch (const std::invalid_argument& error) {
    std::printf("%s\n", error.what());
  }
}

void print_refusals(const RuleInfo& rule, const StepParams& step, const Device& device) {
  expect_refusal([&] { run_step(find_rule("adam"), step, device); });
  expect_refusal([&] {
    StepParams wrong = step;
    wrong.options.limit.kind = LimitKind::kPerTensor;
    run_step(rule, wrong, device);
  });
  expect_refusal([&] {
    StepParams wrong = step;
    wrong.num_spans = 0;
    run_step(rule, wrong, device);
  });
  const auto refuse_info = [&](auto change) {
    TensorInfo info = describe({});
    change(info);
    expect_refusal([&] { Layout({info}, needs_of(rule)); });
  };
  refuse_info([](TensorInfo& it) { it.grad = Storage::kFloat16; });
  refuse_info([](TensorInfo& it) { it.states[0] = Storage::kFloat64; });
  refuse_info([](TensorInfo& it) { it.param = static_cast<Storage>(99); });
  refuse_info([](TensorInfo& it) { it.row_size = 3; });
  refuse_info([](TensorInfo& it) { it.group = 1; });
}

}  // namespace

int main() {
  const RuleInfo& rule = find_rule("sgd");
  Model model;
  TensorPointers pointers{};
  pointers.param = model.params;
  pointers.scalars[0] = &model.steps;

  const Device device;  // one CPU thread
  const Layout layout({describe(model)}, needs_of(rule));
  std::vector<double> workspace(layout.bytes() / sizeof(double));
  const std::vector<char> tables = layout.tables({pointers});
  upload(device, workspace.data(), tables.data(), tables.size());

  StepParams step{};
  layout.bind(reinterpret_cast<char*>(workspace.data()), step);
  const void* const grads[] = {model.grads};
  const std::vector<double> groups = make_groups(rule);
  StepControl control{};
  step.grads = grads;
  step.groups = reinterpret_cast<const Group*>(groups.data());
  step.control = &control;
  step.options.max_grad_norm = 1;
  step.options.measure = true;
  const int status = run_step(rule, step, device);
  std::printf("%d %g %g %g %g %g %g\n", status, model.params[0], model.params[1], model.params[2],
              model.params[3], control.grad_norm, control.clip_coef);
  print_refusals(rule, step, device);
}
