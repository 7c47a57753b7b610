#include "cpu/schedule.h"

#include <algorithm>

namespace fusedopt::cpu {

std::vector<Span> make_spans(const TensorEntry* tensors, const std::vector<Chunk>& chunks) {
  const auto size_of = [&](const Chunk& chunk) { return chunk.size(tensors[chunk.tensor].numel); };
  int64_t total = 0;
  for (const Chunk& chunk : chunks) total += size_of(chunk);
  // Long runs suit the prefetchers, but at their end no thread is to wait long for another.
  constexpr int64_t kSpans = 64, kLongest = 16 * kChunkSize;
  const int64_t wanted = std::clamp(total / kSpans, kChunkSize, kLongest);
  std::vector<Span> spans;
  int64_t elements = wanted;  // a full span before the first
  for (int64_t i = 0; i < static_cast<int64_t>(chunks.size()); ++i) {
    if (elements >= wanted) {
      spans.push_back({i, i});
      elements = 0;
    }
    spans.back().last = i + 1;
    elements += size_of(chunks[i]);
  }
  return spans;
}

}  // namespace fusedopt::cpu
