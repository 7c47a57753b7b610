// How the threads of a team share the chunks of a pass.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/params.h"
#include "cpu/fetch.h"

namespace fusedopt::cpu {

// Prefetches the first cache lines of an array. A small tensor ends before the processor's own
// prefetcher starts.
inline void prefetch(const void* data) { fetch<256>(static_cast<const char*>(data)); }

// The order in which the chunks of a pass are taken.
enum class Order { kForward, kReverse };

// The arrays that a pass reads.
enum class Arrays { kGrads, kAll };

inline void prefetch(const StepParams& step, int64_t chunk, Arrays arrays) {
  if (chunk >= step.num_chunks || step.chunks[chunk].index != 0) return;
  const uint32_t tensor = step.chunks[chunk].tensor;
  prefetch(step.grads[tensor]);
  if (arrays == Arrays::kGrads) return;
  void* const* const pointers = step.pointers + tensor * step.num_pointers;
  for (int64_t i = 0; i < step.num_pointers; ++i) prefetch(pointers[i]);
}

// Gives the spans of chunks to the threads, one span at a time.
class Walk {
 public:
  Walk(const StepParams& step, Order order, Arrays arrays)
      : step_(step), order_(order), arrays_(arrays) {}

  // Calls body(chunk) for every chunk that has a gradient. All threads of a team call run(), and
  // each chunk goes to one of them. The chunks of a span are neighbors in memory.
  template <class Body>
  void run(Body body) {
    constexpr int64_t kAhead = 3;
    for (int64_t turn = next_++; turn < step_.num_spans; turn = next_++) {
      const bool forward = order_ == Order::kForward;
      const Span span = step_.spans[forward ? turn : step_.num_spans - 1 - turn];
      for (int64_t i = span.first; i < span.last; ++i) {
        prefetch(step_, i + kAhead, arrays_);
        if (step_.grads[step_.chunks[i].tensor] != nullptr) {
          body(i);
        } else {
          step_.chunk_sums[i] = 0;
        }
      }
    }
  }

 private:
  const StepParams& step_;
  const Order order_;
  const Arrays arrays_;
  std::atomic<int64_t> next_{0};
};

}  // namespace fusedopt::cpu
