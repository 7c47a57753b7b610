// What a step measures on the CPU: the norm of the gradients, and telemetry. No rule has a part in
// it.
#pragma once

#include "core/params.h"
#include "cpu/isa.h"

namespace fusedopt::cpu {

// A chunk's gradients: what they add to the norm, and for telemetry.
void measure_grads(const StepParams& step, Isa isa, int64_t chunk);

// Sums of squares of a chunk's parameters and of their updates, in lanes by the element's place in
// its row: single precision (double for double) within a chunk, which hides behind the memory.
template <class T, int64_t kRow>
struct UpdateLanes {
  explicit UpdateLanes(int64_t size) {
    while (width < size && width < kRow) width *= 2;
    for (int64_t i = 0; i < width; ++i) params[i] = updates[i] = 0;
  }
  int64_t width = 1;
  alignas(64) T params[kRow];
  alignas(64) T updates[kRow];
};

// The sum of so many lanes, a power of two: the halves are added until kTensorLanes are left. It
// leaves nothing of them.
double total_of_lanes(Isa isa, float* lanes, int64_t width);
double total_of_lanes(Isa isa, double* lanes, int64_t width);

// The norms of all tensors, once all chunks are measured.
void measure_tensors(const StepParams& step);

// Of all that the chunks have added to the norm.
double total_of_chunks(const StepParams& step);

// Takes a step's norms into an adaptive clip's statistics.
void observe(const StepParams& step, const Decision& decision);

// The smallest coefficient of this step: that of all gradients, or one of a tensor's or a unit's
// own.
double smallest_coef(const StepParams& step, const Decision& decision);

// A tensor's row of telemetry, from its chunks.
ParamRow param_row(const StepParams& step, int64_t tensor, const Decision& decision);

}  // namespace fusedopt::cpu
