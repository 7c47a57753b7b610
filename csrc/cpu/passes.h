// The two passes on the CPU: the norm of the gradients, and the update.
#pragma once

#include <cstdint>
#include <vector>

#include "../params.h"

namespace fusedopt::cpu {

// A run of neighboring chunks: what a thread takes at a time.
struct Span {
  int64_t first, last;
};

std::vector<Span> make_spans(const TensorEntry* tensors, const std::vector<Chunk>& chunks);

struct Schedule {
  const std::vector<Span>& spans;
  int threads;
};

// All is done on return.
template <class Rule>
void run(const Pass& pass, const Schedule& schedule, Phases phases);

}  // namespace fusedopt::cpu
