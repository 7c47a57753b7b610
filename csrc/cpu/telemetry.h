// The telemetry that a chunk's update measures.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "cpu/isa.h"

namespace fusedopt::cpu {

// Sums of squares of a chunk's parameters and of their changes. An element's lane is its place in
// its row. The lanes are float32 (float64 for float64 parameters): float32 is fast enough to hide
// behind memory traffic.
template <class T>
class UpdateLanes {
 public:
  UpdateLanes(const TensorShape& shape, int64_t chunk_size);

  // Adds a row of elements: `before` the update, and `after` it.
  void add(Isa isa, int64_t first, int64_t count, const T* before, const T* after);

  void leave_totals(Isa isa, ChunkMeasures& measures);

 private:
  static constexpr int64_t kMaxLanes = kRowBytes / (sizeof(T) == sizeof(float) ? 2 : sizeof(T));
  const int64_t lanes_;
  int64_t width_ = 1;  // lanes that are in use, a power of two
  alignas(64) T params_[kMaxLanes];
  alignas(64) T updates_[kMaxLanes];
};

extern template class UpdateLanes<float>;
extern template class UpdateLanes<double>;

}  // namespace fusedopt::cpu
