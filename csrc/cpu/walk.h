// How the threads of a team share the chunks of a pass.
#pragma once

#include <atomic>
#include <cfenv>
#include <cstdint>

#include "core/params.h"

namespace fusedopt::cpu {

// IEEE arithmetic for as long as it lives, on its thread: torch.set_flush_denormal, or a library
// that was built with -ffast-math, may have switched subnormal numbers off on some threads.
class IeeeArithmetic {
 public:
  IeeeArithmetic() {
    fegetenv(&before_);
    fesetenv(FE_DFL_ENV);
  }
  ~IeeeArithmetic() { fesetenv(&before_); }
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;

 private:
  fenv_t before_;
};

// Calls body() in so many threads at once, the caller's among them.
template <class Body>
void in_parallel(int threads, Body body) {
#pragma omp parallel num_threads(threads)
  {
    const IeeeArithmetic ieee;
    body();
  }
}

// The first lines of an array: a small tensor is over before the processor has begun to fetch ahead
// by itself.
inline void prefetch(const void* data) {
  constexpr int kLine = 64, kLines = 4;
  for (int line = 0; line < kLines; ++line) {
    __builtin_prefetch(static_cast<const char*>(data) + line * kLine);
  }
}

// The order in which the chunks of a pass are taken.
enum class Order { kForward, kReverse };

inline void prefetch(const StepParams& step, int64_t chunk, Order order) {
  if (chunk >= step.num_chunks || step.chunks[chunk].index != 0) return;
  const uint32_t tensor = step.chunks[chunk].tensor;
  prefetch(step.grads[tensor]);
  if (order == Order::kForward) return;  // the norm pass reads no more than that
  void* const* const pointers = step.pointers + tensor * step.num_pointers;
  for (int64_t i = 0; i < step.num_pointers; ++i) prefetch(pointers[i]);
}

// Deals out the spans of chunks to the threads that ask.
class Walk {
 public:
  Walk(const StepParams& step, Order order) : step_(step), order_(order) {}

  // Calls body(chunk) for every chunk that has a gradient, each in one of the threads that call
  // this. Within a span, chunks follow each other in memory.
  template <class Body>
  void run(Body body) {
    constexpr int64_t kAhead = 3;
    for (int64_t turn = next_++; turn < step_.num_spans; turn = next_++) {
      const bool forward = order_ == Order::kForward;
      const Span span = step_.spans[forward ? turn : step_.num_spans - 1 - turn];
      for (int64_t i = span.first; i < span.last; ++i) {
        prefetch(step_, i + kAhead, order_);
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
  std::atomic<int64_t> next_{0};
};

}  // namespace fusedopt::cpu
