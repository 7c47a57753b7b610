// Rows of arrays of 8 bits. Roots are loaded and stored as roots: see RuleLoop.
#pragma once

#include <cstdint>

#include "core/storage.h"
#include "cpu/isa.h"
#include "math/random.h"

namespace fusedopt::cpu {

// As load_row() and store_row(). A row begins with a block.
void load_blocks(Isa isa, const Array& array, int64_t first, int64_t count, float* to);
void store_blocks(Isa isa, const float* from, int64_t first, int64_t count, const Array& array,
                  const RandomBits& random);

}  // namespace fusedopt::cpu
