#include "cpu/telemetry.h"

#include "cpu/grad_norm.h"

namespace fusedopt::cpu {

namespace {

template <class T>
struct AddRow {
  static FUSEDOPT_INLINE void run(const T* before, const T* after, int64_t count, T* params,
                                  T* updates) {
#pragma GCC ivdep
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; ++i) {
      const T update = after[i] - before[i];
      params[i] += before[i] * before[i];
      updates[i] += update * update;
    }
  }
};

// Adds the upper half of the lanes to the lower half until kTensorLanes are left, then folds these
// in float64.
template <class T>
struct FoldLanes {
  static FUSEDOPT_INLINE void run(T* lanes, int64_t width, double* result) {
    while (width > kTensorLanes) {
      width /= 2;
#pragma GCC ivdep
      for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    Lanes<SumOfSquares, kTensorLanes, double> total;
    total.add([=](int64_t lane) { return static_cast<double>(lanes[lane]); }, width);
    *result = total.fold();
  }
};

}  // namespace

template <class T>
UpdateLanes<T>::UpdateLanes(const TensorShape& shape, int64_t chunk_size)
    : lanes_(kRowBytes / bytes_of(shape.param)) {
  while (width_ < chunk_size && width_ < lanes_) width_ *= 2;
  for (int64_t i = 0; i < width_; ++i) params_[i] = updates_[i] = 0;
}

template <class T>
void UpdateLanes<T>::add(Isa isa, int64_t first, int64_t count, const T* before, const T* after) {
  const int64_t lane = first % lanes_;
  run_best<AddRow<T>>(isa, before, after, count, params_ + lane, updates_ + lane);
}

template <class T>
void UpdateLanes<T>::leave_totals(Isa isa, ChunkMeasures& measures) {
  run_best<FoldLanes<T>>(isa, params_, width_, &measures.param_squares);
  run_best<FoldLanes<T>>(isa, updates_, width_, &measures.update_squares);
}

template class UpdateLanes<float>;
template class UpdateLanes<double>;

}  // namespace fusedopt::cpu
