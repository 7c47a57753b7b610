#include "kernels.h"

#include <iterator>
#include <stdexcept>

#include "core/dispatch.h"
#include "rules/all.h"

namespace fusedopt {

namespace {

template <class Rule>
RuleInfo describe() {
  RuleInfo info;
  info.name = Rule::kName;
  info.hyperparameters.assign(std::begin(Rule::kHyperparameters), std::end(Rule::kHyperparameters));
  info.scalars.assign(std::begin(Rule::kScalars), std::end(Rule::kScalars));
  info.states.assign(std::begin(Rule::kStates), std::end(Rule::kStates));
  info.states_used = [](const Group& group) {
    return Rule::states_used(hyperparameters<Rule>(group));
  };
  info.run_cpu = cpu::run<Rule>;
#if FUSEDOPT_WITH_CUDA
  info.run_cuda = cuda::run<Rule>;
#endif
  return info;
}

}  // namespace

const RuleInfo& find_rule(const std::string& name) {
#define FUSEDOPT_DESCRIBE(Rule) describe<Rule>(),
  static const RuleInfo rules[] = {FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_DESCRIBE)};
#undef FUSEDOPT_DESCRIBE
  for (const RuleInfo& rule : rules) {
    if (rule.name == name) return rule;
  }
  throw std::invalid_argument("no rule is called " + name);
}

}  // namespace fusedopt
