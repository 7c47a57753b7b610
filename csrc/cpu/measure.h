// The norm pass, which no rule has a part in.
#pragma once

#include "../params.h"
#include "isa.h"

namespace fusedopt::cpu {

// What a chunk adds to the norm: the sum of its squares, or its largest magnitude.
double chunk_norm(const Pass& pass, Isa isa, Chunk chunk);

// Of all that the chunks have added.
double total_of_chunks(const Pass& pass);

}  // namespace fusedopt::cpu
