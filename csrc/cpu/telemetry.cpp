#include "cpu/telemetry.h"

#include "cpu/grad_norm.h"

namespace fusedopt::cpu {

namespace {

template <class T, class Second>
struct AddRow {
  using lane_t = typename Second::lane_t;
  static FUSEDOPT_INLINE void run(const T* before, const T* after, int64_t count, lane_t* params,
                                  lane_t* seconds) {
#pragma GCC ivdep
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; ++i) {
      const lane_t second = Second::of(before, after, i);
      seconds[i] += second * second;
      if constexpr (Second::kBesideParams) {
        const lane_t param = before[i];
        params[i] += param * param;
      }
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

template <class T, class Second>
SquareLanes<T, Second>::SquareLanes(const TensorShape& shape, int64_t chunk_size)
    : lanes_(kRowBytes / bytes_of(shape.param)) {
  while (width_ < chunk_size && width_ < lanes_) width_ *= 2;
  for (int64_t i = 0; i < width_; ++i) params_[i] = seconds_[i] = 0;
}

template <class T, class Second>
void SquareLanes<T, Second>::add(Isa isa, int64_t first, int64_t count, const T* before,
                                 const T* after) {
  const int64_t lane = first % lanes_;
  run_best<AddRow<T, Second>>(isa, before, after, count, params_ + lane, seconds_ + lane);
}

template <class T, class Second>
void SquareLanes<T, Second>::leave_totals(Isa isa, double* params, double* seconds) {
  run_best<FoldLanes<lane_t>>(isa, params_, width_, params);
  run_best<FoldLanes<lane_t>>(isa, seconds_, width_, seconds);
}

template class SquareLanes<float, Changes<float>>;
template class SquareLanes<double, Changes<double>>;
template class SquareLanes<float, Terms<float, true>>;
template class SquareLanes<double, Terms<double, true>>;
template class SquareLanes<float, Terms<float, false>>;
template class SquareLanes<double, Terms<double, false>>;

}  // namespace fusedopt::cpu
