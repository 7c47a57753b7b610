// Sums of squares, or largest magnitudes, over a chunk and over a tensor's chunks. Both are
// combined in lanes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/exact_sum.h"
#include "core/params.h"
#include "math/convert.h"
#include "math/norm.h"

namespace fusedopt::cpu {

// Combines neighboring terms. `count` is the number of results, half the number of terms.
template <class Norm, class T>
FUSEDOPT_INLINE void combine_neighbors(const T* __restrict terms, double* __restrict results,
                                       int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    results[i] =
        Norm::combine(static_cast<double>(terms[2 * i]), static_cast<double>(terms[2 * i + 1]));
  }
}

// Brings no memory into the cache ahead of a loop.
struct NoAhead {
  static constexpr bool kActs = false;
  FUSEDOPT_INLINE void operator()(int64_t) const {}
};

// The lanes of a sum or of a maximum, in the type T. Term i goes to lane i % kLanes. fold() then
// combines neighboring lanes in float64, then neighboring results, until one is left.
template <class Norm, int64_t kLanes, class T>
class Lanes {
 public:
  // Adds the terms [first, first + count). `first` is a multiple of kLanes. Calls ahead(i) for
  // every 16th of the terms i of a full row, before it reads them.
  template <class Term, class Ahead = NoAhead>
  FUSEDOPT_INLINE void add_row(Term term, int64_t first, int64_t count, Ahead ahead = {}) {
    if (first == 0) used_ = count;
    if (count < kLanes || !Ahead::kActs) return add_terms(term, first, 0, count);
    for (int64_t lane = 0; lane < kLanes; lane += kStretch) {
#pragma GCC unroll 4
      for (int64_t line = 0; line < kStretch; line += kLine) ahead(first + lane + line);
      add_terms(term, first, lane, kStretch);
    }
  }

  // Adds the terms [0, count).
  template <class Term, class Ahead = NoAhead>
  FUSEDOPT_INLINE void add(Term term, int64_t count, Ahead ahead = {}) {
    for (int64_t first = 0; first < count; first += kLanes) {
      add_row(term, first, std::min(count - first, kLanes), ahead);
    }
  }

  // Adds the lanes of another sum to these lanes.
  template <class U>
  FUSEDOPT_INLINE void add_lanes(const Lanes<Norm, kLanes, U>& other) {
    for (int64_t lane = 0; lane < other.used_; ++lane) {
      const T value = static_cast<T>(other.lanes_[lane]);
      lanes_[lane] = lane < used_ ? Norm::combine(lanes_[lane], value) : value;
    }
    used_ = std::max(used_, other.used_);
  }

  // Combines all lanes into one result. Unused lanes count as zero.
  FUSEDOPT_INLINE double fold() {
    int64_t width = kFew;
    while (width < used_) width *= 4;
    for (int64_t lane = used_; lane < width; ++lane) lanes_[lane] = 0;
    alignas(64) double wide[kLanes / 2], few[std::max(kLanes / 4, kFew)];
    if (width == kFew) {
      for (int64_t lane = 0; lane < kFew; ++lane) few[lane] = lanes_[lane];
      return fold_few(few);
    }
    combine_neighbors<Norm>(lanes_, wide, width / 2);
    combine_neighbors<Norm>(wide, few, width / 4);
    for (width /= 4; width > kFew; width /= 4) {
      combine_neighbors<Norm>(few, wide, width / 2);
      combine_neighbors<Norm>(wide, few, width / 4);
    }
    return fold_few(few);
  }

 private:
  template <class, int64_t, class>
  friend class Lanes;

  static constexpr int64_t kLine = 16, kStretch = std::min<int64_t>(64, kLanes);

  // The last kFew lanes are folded without a loop: for small tensors the loop itself would take
  // most of the time.
  static constexpr int64_t few_lanes() {
    int64_t width = kLanes;
    while (width > 16) width /= 4;
    return width;
  }
  static constexpr int64_t kFew = few_lanes();

  // Adds the terms of the lanes [lane, lane + count) in the row that begins at `first`.
  template <class Term>
  FUSEDOPT_INLINE void add_terms(Term term, int64_t first, int64_t lane, int64_t count) {
    if (first == 0) {
      for (int64_t i = lane; i < lane + count; ++i) lanes_[i] = term(i);
      return;
    }
#pragma GCC ivdep
    for (int64_t i = lane; i < lane + count; ++i) {
      lanes_[i] = Norm::combine(lanes_[i], term(first + i));
    }
  }

  static FUSEDOPT_INLINE double fold_few(double* few) {
#pragma GCC unroll 8
    for (int64_t width = kFew / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < width; ++i) few[i] = Norm::combine(few[2 * i], few[2 * i + 1]);
    }
    return few[0];
  }

  alignas(64) T lanes_[kLanes];
  int64_t used_ = 0;
};

// The terms of gradients, computed in T.
template <class Norm, class grad_t, class T>
struct Term {
  const grad_t* grads;
  FUSEDOPT_INLINE T operator()(int64_t i) const {
    return Norm::term(static_cast<T>(widen(grads[i])));
  }
};

// Brings gradients into the cache, two rows ahead: a row fills a page, and a processor's own
// prefetcher stops at the end of a page.
template <int64_t kLanes, class grad_t>
struct GradsAhead {
  static constexpr bool kActs = true;
  const grad_t* grads;
  FUSEDOPT_INLINE void operator()(int64_t i) const { __builtin_prefetch(grads + i + 2 * kLanes); }
};

// The number of lanes of a chunk whose parameter is stored as param_t.
template <class param_t>
inline constexpr int64_t kNormLanes = kRowBytes / sizeof(param_t);

template <class Norm, int64_t kLanes, class grad_t, class T>
struct ChunkNorm {
  static FUSEDOPT_INLINE void run(const grad_t* grads, int64_t count, double* result) {
    Lanes<Norm, kLanes, T> lanes;
    lanes.add(Term<Norm, grad_t, T>{grads}, count, GradsAhead<kLanes, grad_t>{grads});
    *result = lanes.fold();
  }
};

// Combines term(first) ... term(first + count - 1) in kTensorLanes lanes.
template <class Norm, class Of>
double total_of(int64_t first, int64_t count, Of term) {
  if (count == 1) return term(first);
  Lanes<Norm, kTensorLanes, double> lanes;
  lanes.add([&](int64_t i) { return term(first + i); }, count);
  return lanes.fold();
}

// The exact sum of term(first) ... term(first + count - 1), rounded once.
template <class Of>
double exact_total_of(int64_t first, int64_t count, Of term) {
  if (count == 1) return term(first);
  ExactSum sum;
  for (int64_t i = 0; i < count; ++i) sum.add(term(first + i));
  return sum.result();
}

}  // namespace fusedopt::cpu
