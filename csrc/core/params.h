// The structs that a step's caller passes to the kernels. They need neither torch nor Python.
#pragma once

#include <cstdint>

#include "core/decision.h"
#include "core/storage.h"
#include "core/telemetry.h"
#include "math/norm.h"

namespace fusedopt {

// A chunk is the unit of work and of summation: kChunkSize elements of one tensor in memory order,
// or fewer at the tensor's end.
inline constexpr int64_t kChunkSize = 16384;

// A chunk's squares are summed in lanes: element i goes to lane i % lanes. A chunk has as many
// lanes as elements of the parameter fit in kRowBytes. 256 CUDA threads read so many bytes at once,
// 16 bytes each.
inline constexpr int64_t kRowBytes = 4096;

// A part of a row is summed in kTensorLanes lanes, and so are the chunks of a tensor's telemetry.
// Sums of chunks and of parts are added exactly: see core/exact_sum.h.
inline constexpr int kTensorLanes = 32;

// A part of a row is summed in runs of so many elements: in float32 within a run, in float64 over
// the runs.
inline constexpr int64_t kRunSize = 512;

inline constexpr int kMaxStates = 3;
inline constexpr int kMaxScalars = 3;

// The properties of a tensor that are the same at every step.
struct TensorShape {
  int64_t numel;
  int64_t first_chunk;  // index among the chunks of all tensors of its device
  uint32_t group;
  uint32_t number;        // index among the tensors of all devices
  int64_t first_element;  // the index of element 0 in the whole tensor, if this is a part of it
  Storage param, grad, states[kMaxStates];
};
static_assert(sizeof(TensorShape) == 40, "the table on the device is to cost 40 bytes per tensor");

// Whether a state of the tensor is stored as its root.
FUSEDOPT_INLINE bool has_roots(const TensorShape& shape) {
  bool result = false;
  for (const Storage state : shape.states) result = result || is_root(state);
  return result;
}

// Whether an array of the tensor is rounded at random.
FUSEDOPT_INLINE bool is_stochastic(const TensorShape& shape) {
  bool result = is_stochastic(shape.param);
  for (const Storage state : shape.states) {
    result = result || is_stochastic(state);
  }
  return result;
}

// The rows of a tensor. One index of the first dimension selects one row.
struct TensorRows {
  int64_t size;   // elements per row
  int64_t first;  // index of the first row among the rows of all tensors of its device
};

FUSEDOPT_INLINE int64_t chunks_of(int64_t numel) { return (numel + kChunkSize - 1) / kChunkSize; }

struct Chunk {
  uint32_t tensor;  // index into the tables of tensors
  uint32_t index;   // index of this chunk in its tensor

  FUSEDOPT_INLINE int64_t begin() const { return index * kChunkSize; }
  FUSEDOPT_INLINE int64_t size(int64_t numel) const {
    const int64_t rest = numel - begin();
    return rest < kChunkSize ? rest : kChunkSize;
  }
};

// A range of neighboring chunks. A CPU thread takes one span at a time.
struct Span {
  int64_t first, last;
};

// One parameter group. The hyperparameters of all groups follow the table of groups in memory: for
// each group, the rule's hyperparameters as doubles, in the order of the rule.
struct Group {
  const void* lr;        // null, or the address of a learning rate on the device
  Storage lr_storage;    // float32 or float64
  bool is_unclipped;     // its gradients are neither clipped nor part of the norm that clips
  uint32_t states_used;  // bit k: the rule's kStates[k] is used
  uint64_t seed;         // of stochastic rounding
};
static_assert(sizeof(Group) == 3 * sizeof(double), "a table of groups is one of doubles");

// Sums of squares over a segment, or over a part of a segment.
struct SegmentSums {
  double grads, params;
};

// Sums of squares over a chunk, of a rule with a trust ratio: see core/trust.h.
struct TrustSums {
  double params, terms;
};

// The rings where a step writes its telemetry.
struct Telemetry {
  double* steps;     // per row: kStepColumns, then each group's lr; set on the first device only
  ParamRow* params;  // per row: one ParamRow per tensor; null: telemetry is off
  int64_t rows;      // step t, counted from 0, is in row t % rows
};

// All that a step reads and writes on one device. On CUDA, `grads` and `groups` point to host
// memory, and all other pointers to device memory.
struct StepParams {
  // Tables that are the same at every step.
  const TensorShape* shapes;
  void* const* pointers;   // per tensor: see core/coefficients.h, Pointers
  float* const* scales;    // one per tensor and state of the rule; null: no state has 8 bits
  const TensorRows* rows;  // one per tensor, for limits of rows; else null
  const Chunk* chunks;
  const Span* spans;  // CPU only
  int64_t num_tensors, num_chunks, num_spans, num_groups;
  int64_t num_pointers;  // per tensor

  // Values that the caller sets at every step.
  const void* const* grads;     // one per tensor; null: no gradient, the tensor is not touched
  const Group* groups;          // followed by their hyperparameters
  int64_t num_hyperparameters;  // per group
  StepControl* control;
  StepOptions options;
  bool updates_limit;  // this device adds the step's norms to the statistics of options.limit
  bool has_unclipped;  // a group is not clipped; false: Group::is_unclipped is not read
  Telemetry telemetry;

  // Memory that the kernels work with; see core/layout.h.
  double* chunk_sums;             // one per chunk: its gradients' squares, or largest magnitude
  ChunkMeasures* chunk_measures;  // one per chunk, for telemetry; else null
  SegmentSums* part_sums;  // for limits of rows: one per part, see core/segments.h; else null
  double* part_coefs;      // for limits of rows: one per part, as in part_sums; else null
  double* chunk_coefs;     // for limits of segments: the smallest of each chunk; else null
  TrustSums* trust_sums;   // for rules with a trust ratio: one per chunk; else null
  double* trust_ratios;    // for rules with a trust ratio: one per tensor; else null
  unsigned* tickets;       // CUDA only: one per pass, zero between launches
  void* step_args;         // CUDA only: room for StepArgs that exceed kInlinedArgs; else null
};

FUSEDOPT_INLINE bool is_unclipped(const StepParams& step, uint32_t tensor) {
  return step.has_unclipped && step.groups[step.shapes[tensor].group].is_unclipped;
}

// What a chunk with this sum of squares adds to the norm that clips. A chunk that is not clipped
// adds nothing, but inf and nan always count: they skip the step.
FUSEDOPT_INLINE double counted_sum(const StepParams& step, int64_t chunk, double sum) {
  const bool is_finite = sum - sum == 0;
  return is_finite && is_unclipped(step, step.chunks[chunk].tensor) ? 0 : sum;
}

}  // namespace fusedopt
