// The measurements that a block makes of a chunk.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/vector.cuh"

namespace fusedopt::cuda {

// One thread's measurements of a chunk's gradients.
struct GradMeasures {
  double norm, largest;
};

template <class Norm, class grad_t, int kVector,
          class NormLanes = Lanes<Norm, kVector, opmath_t<grad_t>>>
struct GradMeter {
  NormLanes lanes;
  magnitude_bits<grad_t> largest = 0;

  // `first`: the index of the first element in its chunk, for lanes in shared memory.
  __device__ void add(const Vector<grad_t, kVector>& grads, Format format, bool telemetry,
                      int first = 0) {
    lanes.add(grads, format, first);
    if (!telemetry) return;
#pragma unroll
    for (int k = 0; k < kVector; ++k) largest = std::max(largest, magnitude(grads.at[k]));
  }

  __device__ GradMeasures result(Format format) {
    return {lanes.fold(), format.widen(bit_cast<grad_t>(largest))};
  }
};

// Counts inf and nan among a chunk's gradients. Only thread 0 gets the results.
template <class grad_t>
__device__ void count_nonfinite(const Slice<grad_t>& grads, int size, Format format, double& infs,
                                double& nans) {
#pragma unroll 1
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const auto value = format.widen(grads.template load<1>(i).at[0]);
    const bool is_nan = value != value;
    infs += !is_nan && value - value != 0 ? 1 : 0;
    nans += is_nan ? 1 : 0;
  }
  infs = block_total<SumOfSquares>(infs);
  nans = block_total<SumOfSquares>(nans);
}

template <class grad_t, int kVector>
__device__ bool is_zero(const Vector<grad_t, kVector>& grads) {
  magnitude_bits<grad_t> any = 0;
#pragma unroll
  for (int k = 0; k < kVector; ++k) any |= magnitude(grads.at[k]);
  return any == 0;
}

// Measures the squares of a chunk's gradients again, in float64 lanes. Only thread 0 gets the
// result.
__device__ inline double look_again(const StepParams& step, int64_t index) {
  const Chunk chunk = step.chunks[index];
  const TensorShape& shape = step.shapes[chunk.tensor];
  const int size = static_cast<int>(chunk.size(shape.numel));
  const Format format(shape);
  double mine = 0;
  visit_array(shape.param, [&](auto param) {
    using param_t = type_of<decltype(param)>;
    visit_storage_beside<param_t>(shape.grad, [&](auto grad) {
      constexpr int kVector = vector_size<param_t>;
      const Slice<type_of<decltype(grad)>> grads(step.grads[chunk.tensor], chunk.begin());
      Lanes<SumOfSquares, kVector, double> lanes;
#pragma unroll 1
      for (int first = threadIdx.x * kVector; first < size; first += kThreads * kVector) {
        const auto row = grads.template load_some<kVector>(first, size);
        if (is_zero(row)) continue;  // most chunks out of range have only zeros
        lanes.add(row, format);
      }
      mine = lanes.fold();
    });
  });
  return block_total<SumOfSquares>(mine);
}

// Combines the threads' measurements of a chunk, and writes chunk_sums and chunk_measures. The
// chunk must have gradients.
template <class Norm>
__device__ void leave_grad_measures(const StepParams& step, int64_t index, const GradMeasures& mine,
                                    bool telemetry) {
  double norm = block_total<Norm>(mine.norm);
  if constexpr (std::is_same_v<Norm, SumOfSquares>) {
    const bool is_double = step.shapes[step.chunks[index].tensor].param == Storage::kFloat64;
    const bool out_of_range = threadIdx.x == 0 && !is_double && !Norm::is_in_range(norm);
    if (__syncthreads_or(out_of_range) != 0) norm = look_again(step, index);
  }
  if (threadIdx.x == 0) step.chunk_sums[index] = norm;
  if (!telemetry) return;
  const double grad_max = block_total<MaxAbs>(mine.largest);
  double infs = 0, nans = 0;
  // Read the chunk again only if its largest magnitude is inf or nan.
  if (__syncthreads_or(mine.largest - mine.largest != 0) != 0) {
    const Chunk chunk = step.chunks[index];
    const TensorShape& shape = step.shapes[chunk.tensor];
    const int size = static_cast<int>(chunk.size(shape.numel));
    visit_array(shape.grad, [&](auto grad) {
      const Slice<type_of<decltype(grad)>> grads(step.grads[chunk.tensor], chunk.begin());
      count_nonfinite(grads, size, Format(shape), infs, nans);
    });
  }
  if (threadIdx.x == 0) {
    ChunkMeasures& measures = step.chunk_measures[index];
    measures.grad_max = grad_max;
    measures.infs = infs;
    measures.nans = nans;
  }
}

// Sums of squares of a chunk's parameters and of a second value, in lanes: for telemetry of their
// changes, for a trust ratio of the rule's terms, in float64. They lie in shared memory, as the
// update has no registers left for them.
template <class Rule>
struct alignas(kVectorBytes) SquareLanes {
  static constexpr int kLaneBytes = Rule::kIsTrustPass ? sizeof(double) : sizeof(float);
  unsigned char bytes[2 * kRowBytes / sizeof(raw16) * kLaneBytes];
};

// The lanes, of type T, for a parameter of this storage.
template <class T>
struct LanesOf {
  const int row;  // their number
  T* const params;
  T* const seconds;

  __device__ LanesOf(unsigned char* lanes, Storage param)
      : row(kRowBytes / static_cast<int>(bytes_of(param))),
        params(reinterpret_cast<T*>(lanes)),
        seconds(params + row) {}

  // All threads of a block call it, between two barriers.
  __device__ void clear() const {
    for (int i = threadIdx.x; i < row; i += kThreads) params[i] = seconds[i] = 0;
  }

  // Adds element i of the chunk.
  __device__ void add(int i, T param, T second) const {
    params[lane_of(i)] += param * param;
    seconds[lane_of(i)] += second * second;
  }

  // Adds the elements first, first + kStride, ... that are below `size`: `before` the update, and
  // `after` it.
  template <int kStride, class stored_t, int kCount>
  __device__ void add(int first, int size, const Vector<stored_t, kCount>& before,
                      const Vector<stored_t, kCount>& after, Format format) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int i = first + k * kStride;
      if (i >= size) continue;
      const T old = format.widen(before.at[k]);
      const T change = format.widen(after.at[k]) - old;
      add(i, old, change);
    }
  }

  // Two warps add up the lanes, one sum each.
  __device__ void leave_totals(double& param_squares, double& second_squares) const {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    if (warp > 1) return;
    T* const lanes = warp == 0 ? params : seconds;
    // The upper half of the lanes is added to the lower half until one lane per thread is left. A
    // thread always works on the same lanes: no barrier is needed.
#pragma unroll 1
    for (int half = row / 2; half >= kWarpSize; half /= 2) {
#pragma unroll 4
      for (int i = lane; i < half; i += kWarpSize) lanes[i] += lanes[i + half];
    }
    const double sum = warp_total<SumOfSquares>(static_cast<double>(lanes[lane]));
    if (lane == 0) (warp == 0 ? param_squares : second_squares) = sum;
  }

  __device__ int lane_of(int i) const { return i & (row - 1); }
};

// Writes the sums of a chunk to chunk_measures, or to trust_sums. Call it after all elements have
// been added.
template <class Rule>
__device__ void leave_squares(const StepParams& step, int64_t index, SquareLanes<Rule>& lanes) {
  __syncthreads();
  const Storage param = step.shapes[step.chunks[index].tensor].param;
  if constexpr (Rule::kIsTrustPass) {
    TrustSums& sums = step.trust_sums[index];
    LanesOf<double>(lanes.bytes, param).leave_totals(sums.params, sums.terms);
  } else {
    ChunkMeasures& it = step.chunk_measures[index];
    if (param == Storage::kFloat64) {
      LanesOf<double>(lanes.bytes, param).leave_totals(it.param_squares, it.update_squares);
    } else {
      LanesOf<float>(lanes.bytes, param).leave_totals(it.param_squares, it.update_squares);
    }
  }
}

}  // namespace fusedopt::cuda
