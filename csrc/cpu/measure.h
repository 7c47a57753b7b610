// The measurements of the norm pass on the CPU. They are the same for all rules.
#pragma once

#include "core/params.h"

namespace fusedopt::cpu {

// Measures a chunk's gradients: their entry in chunk_sums; for telemetry, their ChunkMeasures; for
// limits of rows, the SegmentSums of the chunk's parts.
void measure_chunk(const StepParams& step, int64_t chunk);

// The sum of squares (or the largest magnitude) over all chunks, from chunk_sums.
double total_of_chunks(const StepParams& step);

}  // namespace fusedopt::cpu
