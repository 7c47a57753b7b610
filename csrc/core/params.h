// What travels from a step's caller to the kernels: plain structs, no torch, no Python.
#pragma once

#include <cstdint>

#include "core/decision.h"
#include "core/storage.h"
#include "core/telemetry.h"

namespace fusedopt {

// A chunk is the unit of work and of summation: that many elements of one tensor, in memory order.
inline constexpr int64_t kChunkSize = 16384;

// A chunk's squares are summed in lanes: element i goes to lane i % lanes, where a row of lanes is
// as long as 256 accesses of 16 bytes to the parameter: what a block of CUDA threads reads at once.
inline constexpr int64_t kRowBytes = 4096;

// The sums of all chunks are summed in that many lanes, chunk i in lane i % lanes.
inline constexpr int kTotalLanes = 256;

// The chunks of a tensor, and the parts of a segment, are summed in that many lanes, likewise.
inline constexpr int kTensorLanes = 32;

inline constexpr int kMaxStates = 3;
inline constexpr int kMaxScalars = 2;

// What doesn't change about a tensor from step to step.
struct TensorShape {
  int64_t numel;
  int64_t first_chunk;  // among the chunks of all tensors of its device
  uint32_t group;
  uint32_t number;  // among the tensors of all devices
  Storage param, grad, states[kMaxStates];
};
static_assert(sizeof(TensorShape) == 32, "the table on the device is to cost 32 bytes per tensor");

// The rows of a tensor: what one index of its first dimension selects.
struct TensorRows {
  int64_t size;   // elements of each
  int64_t first;  // among the rows of all tensors of its device
};

FUSEDOPT_INLINE int64_t chunks_of(int64_t numel) { return (numel + kChunkSize - 1) / kChunkSize; }

struct Chunk {
  uint32_t tensor;  // index into the tables of tensors
  uint32_t index;   // of this chunk in its tensor

  FUSEDOPT_INLINE int64_t begin() const { return index * kChunkSize; }
  FUSEDOPT_INLINE int64_t size(int64_t numel) const {
    const int64_t rest = numel - begin();
    return rest < kChunkSize ? rest : kChunkSize;
  }
};

// A range of neighboring chunks: what a CPU thread takes at a time.
struct Span {
  int64_t first, last;
};

// One parameter group. Behind the table of all groups lie their hyperparameters: of every group as
// many doubles as the rule has, in its order.
struct Group {
  const void* lr;        // null, or where a tensor lr lives on the device
  Storage lr_storage;    // float32 or float64
  uint32_t states_used;  // bit k: the rule's kStates[k] is there
};
static_assert(sizeof(Group) == 2 * sizeof(double), "a table of groups is one of doubles");

// Sums of squares over a segment, or over a part of one.
struct SegmentSums {
  double grads, params;
};

// Rings of rows, where a step leaves its telemetry.
struct Telemetry {
  double* steps;     // rows of kStepColumns and the groups' lr; null but on the first device
  ParamRow* params;  // rows of one per tensor; null: nobody asked for telemetry
  int64_t rows;      // step t, counted from 0, is in row t % rows
};

// All that a step reads and writes on one device. On CUDA, `grads` and `groups` lie in host
// memory, and everything else on the device.
struct StepParams {
  // Tables that stay as they are from step to step.
  const TensorShape* shapes;
  void* const* pointers;   // of each tensor: the parameter, the rule's states, the rule's scalars
  const TensorRows* rows;  // one per tensor, for limits of rows; else null
  const Chunk* chunks;
  const Span* spans;  // CPU only
  int64_t num_tensors, num_chunks, num_spans, num_groups;
  int64_t num_pointers;  // of one tensor

  // What a step's caller gives anew.
  const void* const* grads;     // one per tensor; null: no gradient, the tensor is left alone
  const Group* groups;          // behind them, their hyperparameters
  int64_t num_hyperparameters;  // of one group
  StepControl* control;
  StepOptions options;
  bool updates_limit;  // the state of options.limit is not another device's: it takes the norm in
  Telemetry telemetry;

  // Memory that the kernels work with; see core/layout.h.
  double* chunk_sums;             // one per chunk: the squares of its gradients, or their largest
  ChunkMeasures* chunk_measures;  // one per chunk, for telemetry; else null
  SegmentSums* part_sums;  // for limits of rows: one per part, see core/segments.h; else null
  double* part_coefs;      // at the same places
  double* chunk_coefs;     // for limits of segments: the smallest of each chunk; else null
  unsigned* tickets;       // CUDA only: one per pass, zero between launches
  void* step_args;         // CUDA only: room for what doesn't fit in a kernel's arguments; or null
};

}  // namespace fusedopt
