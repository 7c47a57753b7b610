// Sums of squares, or largest magnitudes, over a chunk and over a tensor's chunks. Both are
// combined in lanes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/params.h"
#include "math/convert.h"
#include "math/norm.h"

namespace fusedopt::cpu {

// Combines neighboring terms. `count` is the number of results, half the number of terms.
template <class Norm>
FUSEDOPT_INLINE void combine_neighbors(const double* __restrict terms, double* __restrict results,
                                       int64_t count) {
  for (int64_t i = 0; i < count; ++i) results[i] = Norm::combine(terms[2 * i], terms[2 * i + 1]);
}

// The lanes of a sum or of a maximum. Term i goes to lane i % kLanes. fold() then combines
// neighboring lanes, then neighboring results, until one is left.
template <class Norm, int64_t kLanes>
class Lanes {
 public:
  // Adds the terms [first, first + count). `first` is a multiple of kLanes.
  template <class Term>
  FUSEDOPT_INLINE void add_row(Term term, int64_t first, int64_t count) {
    if (first == 0) {
      used_ = count;
      for (int64_t lane = 0; lane < count; ++lane) lanes_[lane] = term(lane);
      return;
    }
#pragma GCC ivdep
    for (int64_t lane = 0; lane < count; ++lane) {
      lanes_[lane] = Norm::combine(lanes_[lane], term(first + lane));
    }
  }

  template <class Term>
  FUSEDOPT_INLINE void add(Term term, int64_t count) {
    for (int64_t first = 0; first < count; first += kLanes) {
      add_row(term, first, std::min(count - first, kLanes));
    }
  }

  // Combines all lanes into one result and destroys them. Unused lanes count as zero.
  FUSEDOPT_INLINE double fold() {
    int64_t width = kFew;
    while (width < used_) width *= 4;
    for (int64_t lane = used_; lane < width; ++lane) lanes_[lane] = 0;
    alignas(64) double other[kLanes / 2];
    for (; width > kFew; width /= 4) {
      combine_neighbors<Norm>(lanes_, other, width / 2);
      combine_neighbors<Norm>(other, lanes_, width / 4);
    }
    return fold_few();
  }

 private:
  // The last kFew lanes are folded without a loop: for small tensors the loop itself would take
  // most of the time.
  static constexpr int64_t few() {
    int64_t width = kLanes;
    while (width > 16) width /= 4;
    return width;
  }
  static constexpr int64_t kFew = few();

  FUSEDOPT_INLINE double fold_few() {
#pragma GCC unroll 8
    for (int64_t width = kFew / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < width; ++i)
        lanes_[i] = Norm::combine(lanes_[2 * i], lanes_[2 * i + 1]);
    }
    return lanes_[0];
  }

  alignas(64) double lanes_[kLanes];
  int64_t used_ = 0;
};

template <class Norm, class grad_t>
struct Term {
  const grad_t* grads;
  FUSEDOPT_INLINE double operator()(int64_t i) const { return Norm::term(widen(grads[i])); }
};

// The number of lanes of a chunk whose parameter is stored as param_t.
template <class param_t>
inline constexpr int64_t kNormLanes = kRowBytes / sizeof(param_t);

template <class Norm, int64_t kLanes, class grad_t>
struct ChunkNorm {
  static FUSEDOPT_INLINE void run(const grad_t* grads, int64_t count, double* result) {
    Lanes<Norm, kLanes> lanes;
    lanes.add(Term<Norm, grad_t>{grads}, count);
    *result = lanes.fold();
  }
};

// Combines term(first) ... term(first + count - 1) in kTensorLanes lanes.
template <class Norm, class Of>
double total_of(int64_t first, int64_t count, Of term) {
  if (count == 1) return term(first);
  Lanes<Norm, kTensorLanes> lanes;
  lanes.add([&](int64_t i) { return term(first + i); }, count);
  return lanes.fold();
}

}  // namespace fusedopt::cpu
