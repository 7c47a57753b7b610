// Which chunks a thread takes at a time, and how many threads there are.
#pragma once

#include <cstdint>
#include <vector>

#include "core/params.h"

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

}  // namespace fusedopt::cpu
