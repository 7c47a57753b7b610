// What the norm pass measures on the CPU. No rule has a part in it.
#pragma once

#include "core/params.h"

namespace fusedopt::cpu {

// What a chunk's gradients add to the norm; for telemetry, what else it keeps of them; for limits
// of rows, the sums of their parts.
void measure_chunk(const StepParams& step, int64_t chunk);

// The sum of squares (or the largest magnitude) of all chunks that are measured.
double total_of_chunks(const StepParams& step);

}  // namespace fusedopt::cpu
