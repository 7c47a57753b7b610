// What travels from step() to the kernels: plain structs, no torch, no Python.
#pragma once

#include <cstdint>

#include "core/decision.h"
#include "core/telemetry.h"

namespace fusedopt {

// A chunk is the unit of work and of summation: that many elements of one tensor, in memory order.
inline constexpr int64_t kChunkSize = 16384;

// A chunk's squares are summed in lanes: element i goes to lane i % lanes, where a row of lanes is
// as long as 256 accesses of 16 bytes to the parameter: what a block of CUDA threads reads at once.
inline constexpr int64_t kRowBytes = 4096;

// The sums of all chunks are summed in that many lanes, chunk i in lane i % lanes.
inline constexpr int kTotalLanes = 256;

// Telemetry sums up the lanes of a chunk and the chunks of a tensor in that many, likewise.
inline constexpr int kTensorLanes = 32;

inline constexpr int kMaxStates = 3;
inline constexpr int kMaxScalars = 2;
inline constexpr int kMaxHyperparameters = 8;

enum class Dtype : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// One parameter, as long as nothing moves.
struct TensorEntry {
  void* param;
  void* state[kMaxStates];      // in the order of the rule's kStates; null where not used
  float* scalars[kMaxScalars];  // in the order of the rule's kScalars: `step` and its like
  int64_t numel;
  uint32_t group;
  Dtype param_dtype, grad_dtype, state_dtype;
};
static_assert(sizeof(TensorEntry) == 64, "the CUDA table is to cost 64 bytes per tensor");

FUSEDOPT_INLINE int64_t chunks_of(int64_t numel) { return (numel + kChunkSize - 1) / kChunkSize; }

struct Chunk {
  uint32_t tensor;  // index into the table of tensors
  uint32_t index;   // of this chunk in its tensor

  FUSEDOPT_INLINE int64_t begin() const { return index * kChunkSize; }
  FUSEDOPT_INLINE int64_t size(int64_t numel) const {
    const int64_t rest = numel - begin();
    return rest < kChunkSize ? rest : kChunkSize;
  }
};

// One parameter group. The values are those of the rule's Hyperparameters, lr first.
struct Group {
  double values[kMaxHyperparameters];
  const void* lr;  // null, or where a tensor lr lives on the device
  Dtype lr_dtype;
  uint32_t states_used;  // bit k: the rule's kStates[k] is there
};

// The two passes of a step: the norm of the gradients, and the update. kMeasure leaves the sum of
// squares in the control; kUpdate reads it there, so that several devices can add theirs in
// between.
enum class Phases { kMeasure, kUpdate, kBoth };

// Rings of rows, where a step leaves its telemetry.
struct Telemetry {
  ChunkMeasures* chunks;  // one per chunk; null: nobody asked for telemetry
  double* steps;          // rows of `kStepColumns` and the groups' lr; null but on the first device
  ParamRow* params;       // rows of one per tensor
  int64_t rows;           // step t, counted from 0, is in row t % rows
};
inline constexpr int kStepColumns = 3;  // grad_norm, clip_coef, skipped

// The units of one tensor, for a clip that looks at each: as many neighboring elements as one index
// of the first dimension selects.
struct Units {
  int64_t size;         // elements of each
  int64_t first;        // place of the first one's part in the first chunk: see OwnClips
  int64_t first_chunk;  // of the tensor, counted over all tensors
  int64_t number;       // of the tensor, counted over all devices

  FUSEDOPT_INLINE int64_t first_chunk_of(int64_t unit) const { return unit * size / kChunkSize; }
  FUSEDOPT_INLINE int64_t chunks_of(int64_t unit) const {
    return ((unit + 1) * size - 1) / kChunkSize - unit * size / kChunkSize + 1;
  }
};
// The units of a chunk, one after the other, as far as they lie in it.
struct Piece {
  int64_t unit;         // counted in its tensor
  int64_t first, last;  // elements of the chunk

  FUSEDOPT_INLINE Piece(const Units& units, int64_t begin, int64_t count)
      : unit(begin / units.size), first(0), size_(units.size), count_(count) {
    end_at((unit + 1) * size_ - begin);
  }
  FUSEDOPT_INLINE bool is_there() const { return first < count_; }
  FUSEDOPT_INLINE void next() {
    ++unit;
    first = last;
    end_at(first + size_);
  }

 private:
  FUSEDOPT_INLINE void end_at(int64_t end) { last = end < count_ ? end : count_; }
  int64_t size_, count_;
};

struct UnitSums {
  double grads, params;  // of squares
};

// For clips that look at every tensor or unit by itself: what the norm pass leaves for the update.
// All null for others.
struct OwnClips {
  const Units* units;    // one per tensor
  double* tensor_norms;  // one per tensor: kPerTensor
  // Of a unit's part in a chunk, from Units::first on at the sum of their numbers in the tensor:
  // two chunks share one unit at most. kUnit.
  UnitSums* unit_sums;
  double* coefs;        // at the same places
  double* chunk_coefs;  // the smallest of each chunk
};

// Everything that a pass over the tensors of one device reads and writes.
struct StepParams {
  const TensorEntry* tensors;
  const Chunk* chunks;
  const Group* groups;
  const void* const* grads;     // one per tensor; null: no gradient, the tensor is left alone
  double* chunk_sums;           // one per chunk, of the squares of its gradients
  const int64_t* first_chunks;  // of each tensor, and the end of the last; for telemetry
  StepControl* control;
  int64_t num_tensors;
  int64_t num_chunks;
  int64_t num_groups;
  StepOptions options;
  bool updates_limit;  // the state of options.clip is its owner's: it takes this step's norm in
  OwnClips own_clips;
  Telemetry telemetry;
};

// What one tensor's gradient is multiplied by.
FUSEDOPT_INLINE double factor_of_tensor(const StepParams& step, const Decision& decision,
                                        int64_t tensor) {
  if (step.own_clips.tensor_norms == nullptr) return decision.grad_factor;
  return decision.inv_scale * coef_of_tensor(step.options, decision,
                                             step.own_clips.units[tensor].number,
                                             step.own_clips.tensor_norms[tensor]);
}

// A step's clip_coef is the smallest of all: by this step's coefficient of a tensor, if it is less.
FUSEDOPT_INLINE double coef_with_tensor(const StepParams& step, const Decision& decision,
                                        int64_t tensor, double smallest) {
  if (step.grads[tensor] == nullptr) return smallest;
  return smaller(coef_of_tensor(step.options, decision, step.own_clips.units[tensor].number,
                                step.own_clips.tensor_norms[tensor]),
                 smallest);
}

// Takes a tensor's norm, as it was clipped, into its average.
FUSEDOPT_INLINE void observe_tensor(const StepParams& step, const Decision& decision,
                                    int64_t tensor) {
  if (step.grads[tensor] == nullptr) return;
  const int64_t number = step.own_clips.units[tensor].number;
  const double norm = step.own_clips.tensor_norms[tensor];
  const double coef = coef_of_tensor(step.options, decision, number, norm);
  PerTensor(step.options.clip).observe(number, norm * decision.inv_scale * coef);
}

}  // namespace fusedopt
