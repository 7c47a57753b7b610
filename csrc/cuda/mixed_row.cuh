// A row of arrays of mixed formats, and the lanes of its sum.
#pragma once

#include "cuda/block.cuh"
#include "cuda/vector.cuh"

namespace fusedopt::cuda {

// Where a thread's elements lie in a row of mixed formats: 2048 elements, eight for each thread. If
// the parameter is float32, a chunk's sums have 1024 lanes. So two threads of a warp share lanes,
// and add to them in turns: first the half of the warp that has the row's first 1024 elements.
struct MixedRow {
  static constexpr int kVector = vector_size<raw16>;
  static constexpr int kHalfWarp = kWarpSize / 2, kHalfRow = kThreads * kVector / 2;
  const bool shares_lanes;

  __device__ explicit MixedRow(Storage param) : shares_lanes(param == Storage::kFloat32) {}

  // The thread's first element in a row.
  __device__ int place() const {
    const int thread = computed_anew(static_cast<int>(threadIdx.x));
    if (!shares_lanes) return thread * kVector;
    const int in_half = thread / kWarpSize * kHalfWarp + thread % kHalfWarp;
    return in_half * kVector + (thread / kHalfWarp % 2) * kHalfRow;
  }
  // Whether an element lies in the half of a row that comes second.
  __device__ bool is_second(int element) const { return shares_lanes && (element & kHalfRow) != 0; }
  __device__ int lane_of(int element) const {
    return element & (shares_lanes ? kHalfRow - 1 : 2 * kHalfRow - 1);
  }

  // All threads of a warp call it. The body adds to the lanes of the thread's elements, the first
  // of which is `first`.
  template <class Body>
  __device__ __forceinline__ void in_turn(int first, Body&& body) const {
#pragma unroll 1
    for (int turn = 0; turn < (shares_lanes ? 2 : 1); ++turn) {
      if (turn == (is_second(first) ? 1 : 0)) body();
      __syncwarp();
    }
  }
};

// As Lanes, in shared memory: an update of mixed formats has no registers left for them.
template <class Norm>
struct SharedLanes {
  static constexpr int kVector = MixedRow::kVector;
  float* const lanes;
  const MixedRow row;

  __device__ SharedLanes(float* lanes, const MixedRow& row) : lanes(lanes), row(row) {
    const int first = row.place();
    row.in_turn(first, [&] { of(first) = {}; });
  }

  __device__ Vector<float, kVector>& of(int first) const {
    return *reinterpret_cast<Vector<float, kVector>*>(lanes + row.lane_of(first));
  }

  __device__ void add(const Vector<float, kVector>& grads, Format, int first) {
    row.in_turn(first, [&] {
      Vector<float, kVector> sums = of(first);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        sums.at[k] = Norm::combine(sums.at[k], Norm::term(grads.at[k]));
      }
      of(first) = sums;
    });
  }

  // Of two threads that share lanes, the second one returns 0.
  __device__ double fold() const {
    const int first = row.place();
    double wide[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) wide[k] = row.is_second(first) ? 0.0 : of(first).at[k];
    return cuda::fold<Norm>(wide);
  }
};

}  // namespace fusedopt::cuda
