// The rules by name, for code that learns only at run time which one it is to apply.
#pragma once

#include <string>
#include <vector>

#include "core/params.h"
#include "cpu/passes.h"
#include "rules/rule.h"
#if FUSEDOPT_WITH_CUDA
#include "cuda/passes.h"
#endif

namespace fusedopt {

struct RuleInfo {
  std::string name;
  std::vector<HyperparameterName> hyperparameters;  // in a param group
  std::vector<std::string> scalars;                 // in a parameter's state, 0-d float32
  std::vector<std::string> states;  // in a parameter's state, shaped as the parameter
  unsigned (*states_used)(const Group&);
  void (*run_cpu)(const StepParams&, const cpu::Schedule&, Phases);
#if FUSEDOPT_WITH_CUDA
  cudaError_t (*run_cuda)(const StepParams&, cuda::Launch, Phases);
#endif
};

const RuleInfo& find_rule(const std::string& name);

}  // namespace fusedopt
