// The sum of a chunk's squares, and the sum of all chunks' sums: both in lanes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../math/convert.h"
#include "../params.h"

namespace fusedopt::cpu {

// Adds neighbors, then neighbors of these, until one sum is left. Lanes beyond `used` count as zero.
FUSEDOPT_INLINE double fold(double* lanes, int64_t used) {
  int64_t width = 1;
  while (width < used) width *= 2;
  for (int64_t lane = used; lane < width; ++lane) lanes[lane] = 0;
  for (; width > 1; width /= 2) {
    for (int64_t lane = 0; lane < width / 2; ++lane) {
      lanes[lane] = lanes[2 * lane] + lanes[2 * lane + 1];
    }
  }
  return used > 0 ? lanes[0] : 0;
}

// term(i) for all i < count, in float64.
template <int64_t kLanes, class Term>
FUSEDOPT_INLINE double sum_in_lanes(int64_t count, Term term) {
  alignas(64) double lanes[kLanes];
  const int64_t used = std::min(count, kLanes);
  for (int64_t lane = 0; lane < used; ++lane) lanes[lane] = term(lane);
  for (int64_t row = kLanes; row < count; row += kLanes) {
    const int64_t width = std::min(count - row, kLanes);
#pragma GCC ivdep
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += term(row + lane);
  }
  return fold(lanes, used);
}

template <class param_t, class grad_t>
struct SumOfSquares {
  struct Square {
    const grad_t* grad;
    FUSEDOPT_INLINE double operator()(int64_t i) const {
      const double value = widen(grad[i]);
      return value * value;
    }
  };
  static FUSEDOPT_INLINE void run(const grad_t* grad, int64_t count, double* sum) {
    *sum = sum_in_lanes<kRowBytes / sizeof(param_t)>(count, Square{grad});
  }
};

inline double total(const double* chunk_sums, int64_t num_chunks) {
  return sum_in_lanes<kTotalLanes>(num_chunks, [=](int64_t i) { return chunk_sums[i]; });
}

}  // namespace fusedopt::cpu
