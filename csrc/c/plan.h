// A plan of the boundary in C: tensors that are laid out once, and their steps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "c/fusedopt.h"
#include "kernels.h"

namespace fusedopt {

// The rule's hyperparameters. Throws if a number is out of range.
std::vector<double> hyperparameters_of(const RuleInfo& rule, const double* options);

}  // namespace fusedopt

struct fusedopt_plan {
  fusedopt_plan(const fusedopt::RuleInfo& rule, const std::vector<fusedopt::TensorInfo>& tensors,
                int64_t num_groups, bool on_cuda);

  void step(const fusedopt_step& call);
  void measure(const fusedopt_step& call, const uint8_t* counted, int64_t* message);

  int64_t device_bytes() const;
  void enqueue(const fusedopt_step& call, const fusedopt_cuda& cuda) const;

 private:
  size_t num_arrays() const;
  std::vector<fusedopt::TensorPointers> pointers_to(void* const* arrays) const;
  std::vector<double> groups_of(const double* options) const;
  fusedopt::StepParams bind(char* memory, const fusedopt_step& call) const;
  int threads_for(const fusedopt_step& call) const;
  fusedopt::Device host(const fusedopt_step& call) const;
  void place(void* const* arrays);

  const fusedopt::RuleInfo& rule_;
  const int64_t num_groups_;
  const fusedopt::Layout layout_;
  std::vector<double> workspace_;  // on the host
  std::vector<void*> placed_;      // the addresses in the workspace's tables
};
