// Loops that fetch what the next ones need. The processor's own prefetcher stops at the end of a
// page.
#pragma once

#include <cstdint>

#include "math/inline.h"

namespace fusedopt::cpu {

// Fetches kCount elements.
template <int64_t kCount, class T>
FUSEDOPT_INLINE void fetch(const T* elements) {
  constexpr int64_t kLine = 64 / sizeof(T);
#pragma GCC unroll 8
  for (int64_t i = 0; i < kCount; i += kLine) __builtin_prefetch(elements + i);
}

// Calls body(i) for i = 0, 1, ... Meanwhile it fetches the elements of the arrays that are `ahead`.
template <class Body, class... T>
FUSEDOPT_INLINE void for_each_and_fetch(int64_t count, int64_t ahead, Body body,
                                        const T*... arrays) {
  constexpr int64_t kStep = 32;
  int64_t first = 0;
  for (; first + kStep <= count; first += kStep) {
    (fetch<kStep>(arrays + first + ahead), ...);
#pragma GCC ivdep
    for (int64_t i = 0; i < kStep; ++i) body(first + i);
  }
#pragma GCC ivdep
  for (int64_t i = first; i < count; ++i) body(i);
}

}  // namespace fusedopt::cpu
