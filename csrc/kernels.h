// The only door to the kernels. The code behind it knows neither torch nor Python, and is compiled
// into a library of its own.
//
// A front end lays out its tensors (Layout), copies the tables into a workspace, and then calls
// run_step() for every step. A front end that must do something between the norm and the update,
// such as adding other devices' norms, calls measure(), reduce() and update() instead.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "core/layout.h"
#include "core/message.h"
#include "core/params.h"
#include "core/shared_count.h"
#include "core/team.h"
#include "rules/rule.h"

namespace fusedopt {

// Where a step runs.
struct Device {
  bool is_cuda = false;
  int index = 0;           // CUDA only
  void* stream = nullptr;  // CUDA only: a cudaStream_t
  Team team;               // CPU only
};

// An option of a param group, and the hyperparameters of the rule that it fills.
struct OptionInfo {
  std::string name;
  int first, count;
  double (*on_host)(double);  // null, or a function that the host applies to each number
  bool any_sign;              // else a number below 0 is refused
  bool optional;              // a group without it has 0
};

// Whether an option may have this number. torch's ranges: numbers of pairs, such as betas, are in
// [0, 1), all others are not negative. nan is in no range.
FUSEDOPT_API bool in_range(const OptionInfo& option, double number);

// A rule as a front end sees it.
struct RuleInfo {
  std::string name;
  std::vector<OptionInfo> options;
  std::vector<StateName> scalars;  // 0-d float32 each; the first one counts the steps
  std::vector<StateName> states;   // shaped as the parameter
  int num_hyperparameters;
  bool has_trust_ratio;  // then its steps need more memory: Needs::trust_ratio
  unsigned (*states_used)(const double* hyperparameters);  // bit k: states[k] is used
  int (*update)(const StepParams&, const Device&);
  int (*run_step)(const StepParams&, const Device&);
};

FUSEDOPT_API const std::vector<RuleInfo>& all_rules();

// Throws std::invalid_argument if no rule has this name.
FUSEDOPT_API const RuleInfo& find_rule(const std::string& name);

// update() and run_step() throw std::invalid_argument if the step was laid out for another rule,
// another kind of device, or a limit that needs less memory.
//
// On CUDA these calls enqueue kernels on the stream and return at once. They return 0, or the
// cudaError_t of the launch.
FUSEDOPT_API int measure(const StepParams& step,
                         const Device& device);  // gradients -> step.chunk_sums
FUSEDOPT_API int reduce(const StepParams& step,
                        const Device& device);  // step.chunk_sums -> step.control
// In place of reduce(), if several ranks or devices add up their sums: see core/message.h.
// write_message() adds step.chunk_sums to a message of zeros, where `counted` says so of the chunk.
// read_message() takes the total: it sets the sum of squares in step.control, and *skip.
FUSEDOPT_API int write_message(const StepParams& step, const bool* counted, int64_t* message,
                               const Device& device);
FUSEDOPT_API int read_message(const StepParams& step, const int64_t* total, float* skip,
                              const Device& device);
FUSEDOPT_API int update(const RuleInfo& rule, const StepParams& step, const Device& device);
// All three calls in order. measure() and reduce() run only if step.options.measure is set.
FUSEDOPT_API int run_step(const RuleInfo& rule, const StepParams& step, const Device& device);

// Before a step and after it, if all tensors share their counters (core/shared_count.h), on CUDA.
// They throw std::invalid_argument in a build without CUDA.
FUSEDOPT_API int spread_count(const SharedCount& count, const SharedScalars& scalars,
                              int64_t num_tensors, const Device& device);
FUSEDOPT_API int collect_count(const StepControl& control, const SharedCount& count,
                               const Device& device);

// Copies a table from host memory to device memory without waiting. `bytes` is a multiple of 8.
FUSEDOPT_API int upload(const Device& device, void* to, const void* from, size_t bytes);

FUSEDOPT_API bool built_with_cuda();
FUSEDOPT_API bool is_capturing(void* stream);     // whether a CUDA graph is being captured
FUSEDOPT_API std::string error_name(int status);  // the text for a status returned above
FUSEDOPT_API const char* cpu_isa();               // the instruction set that the CPU kernels use

}  // namespace fusedopt
