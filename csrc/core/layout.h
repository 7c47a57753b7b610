// The workspace of a device: one piece of memory with all that the kernels need beside the arrays.
// It begins with tables, which are copied there once. The rest holds results that one pass leaves
// for a later one.
#pragma once

#include <cstdint>
#include <vector>

#include "core/params.h"
#include "core/segments.h"

namespace fusedopt {

// A tensor as its front end knows it.
struct TensorInfo {
  int64_t numel;
  int64_t row_size;  // elements that one index of the first dimension selects
  uint32_t group;
  uint32_t number;        // index among the tensors of all devices
  int64_t first_element;  // see TensorShape
  Storage param, grad, states[kMaxStates];
};

// The addresses of a tensor's arrays.
struct TensorPointers {
  void* param;
  void* states[kMaxStates];     // in the order of the rule's kStates; null where not used
  float* scalars[kMaxScalars];  // in the order of the rule's kScalars; the first is often `step`
  float* scales[kMaxStates];    // of states of 8 bits; else null
  void* rest;                   // of a master; else null
};

// The features that an optimizer's steps will use. They decide which parts the workspace has.
struct Needs {
  bool on_cuda;
  bool telemetry;
  SegmentKind segments;
  bool trust_ratio;  // of the rule
  int64_t num_groups;
  int num_hyperparameters, num_states, num_scalars;  // of the rule
};

// The values that may change at every step: gradient pointers, groups, hyperparameters. They travel
// in the arguments of CUDA kernels.
struct StepArgs {
  int64_t num_tensors, num_groups, num_hyperparameters;

  explicit FUSEDOPT_INLINE StepArgs(const StepParams& step)
      : num_tensors(step.num_tensors),
        num_groups(step.num_groups),
        num_hyperparameters(step.num_hyperparameters) {}
  FUSEDOPT_INLINE StepArgs(int64_t tensors, int64_t groups, int64_t hyperparameters)
      : num_tensors(tensors), num_groups(groups), num_hyperparameters(hyperparameters) {}

  FUSEDOPT_INLINE int64_t groups_at() const {
    return num_tensors * static_cast<int64_t>(sizeof(void*));
  }
  FUSEDOPT_INLINE int64_t bytes() const {
    const int64_t of_group = static_cast<int64_t>(sizeof(Group)) +
                             num_hyperparameters * static_cast<int64_t>(sizeof(double));
    return groups_at() + num_groups * of_group;
  }
};

// StepArgs of up to this size, about 450 tensors, travel in the arguments of every kernel. Larger
// ones are written to the workspace before or by the first kernel of a step.
inline constexpr int64_t kInlinedArgs = 3760;

class FUSEDOPT_API Layout {
 public:
  // Throws std::invalid_argument if the kernels can't take one of the tensors.
  Layout(const std::vector<TensorInfo>& tensors, const Needs& needs);

  int64_t bytes() const { return bytes_; }
  const std::vector<TensorShape>& shapes() const { return shapes_; }
  int64_t chunk_sums_at() const { return chunk_sums_.at; }
  int64_t num_chunks() const { return static_cast<int64_t>(chunks_.size()); }

  // The tables in the form that the workspace begins with. Expects one entry per tensor.
  std::vector<char> tables(const std::vector<TensorPointers>& pointers) const;

  // Points a step to its tables and to its memory.
  void bind(char* workspace, StepParams& step) const;

 private:
  struct Part {
    int64_t at = 0, bytes = 0;
  };
  Part add(int64_t bytes);
  void make_chunks(const std::vector<TensorInfo>& tensors);
  void make_spans();
  bool has_scales() const;
  int num_pointers() const { return 2 + needs_.num_states + needs_.num_scalars; }

  std::vector<TensorShape> shapes_;
  std::vector<TensorRows> rows_;
  std::vector<Chunk> chunks_;
  std::vector<Span> spans_;
  Needs needs_;
  int64_t num_rows_ = 0;
  int64_t bytes_ = 0, table_bytes_ = 0;
  Part tickets_, shape_table_, pointer_table_, scale_table_, row_table_, chunk_table_, span_table_;
  Part chunk_sums_, chunk_measures_, part_sums_, part_coefs_, chunk_coefs_, step_args_;
  Part trust_sums_, trust_ratios_;
};

}  // namespace fusedopt
