// Sums of squares that the update of a chunk measures: for telemetry, and for trust ratios.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "cpu/isa.h"

namespace fusedopt::cpu {

// What is summed up beside the parameters' squares. Telemetry: the squares of their changes. Its
// lanes are float32 (float64 for float64 parameters), which is fast enough to hide behind memory
// traffic.
template <class T>
struct Changes {
  using lane_t = T;
  static constexpr bool kBesideParams = true;
  static FUSEDOPT_INLINE T of(const T* before, const T* after, int64_t i) {
    return after[i] - before[i];
  }
};

// Trust ratios: the squares of the rule's terms, in float64, where squares of float32 numbers
// neither overflow nor vanish. Some rules need no squares of the parameters.
template <class T, bool kParams>
struct Terms {
  using lane_t = double;
  static constexpr bool kBesideParams = kParams;
  static FUSEDOPT_INLINE T of(const T*, const T* terms, int64_t i) { return terms[i]; }
};

// Sums of squares over a chunk. An element's lane is its place in its row.
template <class T, class Second>
class SquareLanes {
 public:
  SquareLanes(const TensorShape& shape, int64_t chunk_size);

  // Adds a row of elements: `before` the pass, and `after` it, or the terms. `before` may be null
  // if the parameters are not summed up: their sum is 0.
  void add(Isa isa, int64_t first, int64_t count, const T* before, const T* after);

  void leave_totals(Isa isa, double* params, double* seconds);

 private:
  using lane_t = typename Second::lane_t;
  static constexpr int64_t kMaxLanes = kRowBytes / (sizeof(T) == sizeof(float) ? 2 : sizeof(T));
  const int64_t lanes_;
  int64_t width_ = 1;  // lanes that are in use, a power of two
  alignas(64) lane_t params_[kMaxLanes];
  alignas(64) lane_t seconds_[kMaxLanes];
};

extern template class SquareLanes<float, Changes<float>>;
extern template class SquareLanes<double, Changes<double>>;
extern template class SquareLanes<float, Terms<float, true>>;
extern template class SquareLanes<double, Terms<double, true>>;
extern template class SquareLanes<float, Terms<float, false>>;
extern template class SquareLanes<double, Terms<double, false>>;

}  // namespace fusedopt::cpu
