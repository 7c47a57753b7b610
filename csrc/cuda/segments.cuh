// The clip coefficients of segments on CUDA.
#pragma once

#include "core/segments.h"
#include "cuda/block.cuh"
#include "cuda/exact_sum.cuh"
#include "cuda/vector.cuh"
#include "cuda/workers.cuh"

namespace fusedopt::cuda {

// The sum of squares of the values [first, last), in T over runs of kRun values and in float64 over
// the runs. All threads of a warp call it, and all get it.
template <class T, int kRun, class value_t>
__device__ double sum_of_runs(const Slice<value_t>& values, int first, int last, Format format) {
  double total = 0;
#pragma unroll 1
  for (int run = first; run < last; run += kRun) {
    const int end = run + kRun < last ? run + kRun : last;
    T sum = 0;
#pragma unroll 4
    for (int i = run + static_cast<int>(threadIdx.x) % kWarpSize; i < end; i += kWarpSize) {
      const T value = static_cast<T>(format.widen(values.template load<1>(i).at[0]));
      sum = SumOfSquares::combine(sum, SumOfSquares::term(value));
    }
    total += static_cast<double>(sum);
  }
  return warp_total<SumOfSquares>(total);
}

// The sum of squares of a part of a row. All threads of a warp call it, and all get it.
template <class value_t>
__device__ double sum_of_part(const Slice<value_t>& values, const PartWalk& part, Format format) {
  using T = opmath_t<value_t>;
  const int first = static_cast<int>(part.first), last = static_cast<int>(part.last);
  const double sum = sum_of_runs<T, kRunSize>(values, first, last, format);
  if (std::is_same_v<T, double> || SumOfSquares::is_in_range(sum)) return sum;
  return sum_of_runs<double, kWarpSize>(values, first, last, format);
}

// Measures the SegmentSums of every part of a chunk. A warp measures one part at a time.
__device__ inline void measure_parts(const StepParams& step, int64_t index) {
  const Chunk chunk = step.chunks[index];
  const TensorShape& shape = step.shapes[chunk.tensor];
  const Segments segments(step, chunk.tensor, SegmentKind::kRows);
  const Format format(shape);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const auto measure = [&](const auto& params, const auto& grads) {
    PartWalk part(segments, chunk.begin(), chunk.size(shape.numel));
    for (int turn = 0; part.is_there(); part.next(), ++turn) {
      if (turn % (kThreads / kWarpSize) != warp) continue;
      const SegmentSums sums{sum_of_part(grads, part, format), sum_of_part(params, part, format)};
      if (lane == 0) step.part_sums[segments.part(part.segment, chunk.index)] = sums;
    }
  };
  visit_array(shape.param, [&](auto param) {
    using param_t = type_of<decltype(param)>;
    visit_storage_beside<param_t>(shape.grad, [&](auto grad) {
      measure(Slice<param_t>(step.pointers[chunk.tensor * step.num_pointers], chunk.begin()),
              Slice<type_of<decltype(grad)>>(step.grads[chunk.tensor], chunk.begin()));
    });
  });
}

// A chunk's segments, in shared memory of the block that updates the chunk.
struct ChunkSegments {
  double inv_scale;     // of the step
  bool is_shared;       // all elements of the chunk lie in one segment
  double factor;        // if is_shared: the factor of the gradients
  int64_t size;         // if not is_shared: elements per segment
  int64_t begun;        // if not is_shared: elements of the first segment before the chunk
  const double* coefs;  // if not is_shared: coefficients, from the chunk's first segment on

  // The last coefficient that leave_one() has used. It is remembered, as a long segment has many
  // chunks.
  uint32_t known_tensor;
  int64_t known_segment;
  double known_coef;

  // One thread calls it, before the first chunk.
  __device__ void begin(const Decision& decision) {
    inv_scale = decision.inv_scale;
    is_shared = true;
    factor = decision.grad_factor;
    known_tensor = UINT32_MAX;
  }

  // Whether all elements have the same factor, and one multiplication by it is enough.
  __device__ bool is_uniform(const TensorShape& shape) const {
    return is_shared && (shape.param == Storage::kFloat64 || !is_tiny<float>(factor));
  }

  // The factor of element i of the chunk.
  __device__ __forceinline__ double factor_of(int i) const {
    if (is_shared) return factor;
    constexpr int64_t kLongest = INT32_MAX;  // longer segments: at most two meet in a chunk
    const int64_t place = begun + i;
    return inv_scale *
           coefs[size > kLongest ? (place < size ? 0 : 1)
                                 : static_cast<uint32_t>(place) / static_cast<uint32_t>(size)];
  }
};

// Computes the coefficients of a chunk's segments. All threads of a block work on one chunk. If two
// chunks share a segment, each has its own copy of the coefficient: no block reads a copy that
// another block writes.
class SegmentCoefs {
 public:
  __device__ SegmentCoefs(const StepParams& step, const Decision& decision, int64_t index)
      : step_(step),
        decision_(decision),
        index_(index),
        chunk_(step.chunks[index]),
        shape_(step.shapes[chunk_.tensor]),
        kind_(segment_kind(step.options.limit.kind)),
        segments_(step, chunk_.tensor, kind_),
        first_(segments_.at(chunk_.begin())),
        last_(segments_.at(chunk_.begin() + chunk_.size(shape_.numel) - 1)) {}

  // Writes the coefficients to part_coefs and to `shared`, and the smallest one to chunk_coefs.
  __device__ void leave(ChunkSegments& shared) const {
    if (first_ == last_) return leave_one(shared);
    double* const coefs = step_.part_coefs + segments_.part(0, chunk_.index);
    if (segments_.size() <= kChunkSize) {
      for (int64_t segment = first_ + threadIdx.x; segment <= last_; segment += kThreads) {
        coefs[segment] = coef_of_short(segment);
      }
    } else {  // two segments: a warp for each
      const int64_t segment = first_ + threadIdx.x / kWarpSize;
      if (segment <= last_) {
        const double coef = coef_of_long(segment);
        if (threadIdx.x % kWarpSize == 0) coefs[segment] = coef;
      }
    }
    __syncthreads();
    double smallest = decision_.clip_coef;
    for (int64_t segment = first_ + threadIdx.x; segment <= last_; segment += kThreads) {
      smallest = smaller(coefs[segment], smallest);
    }
    smallest = block_total<Smallest>(smallest);
    if (threadIdx.x != 0) return;
    step_.chunk_coefs[index_] = smallest;
    shared.is_shared = false;
    shared.size = segments_.size();
    shared.begun = chunk_.begin() - segments_.begin(first_);
    shared.coefs = coefs + first_;
  }

 private:
  __device__ void leave_one(ChunkSegments& shared) const {
    const bool is_known = shared.known_tensor == chunk_.tensor && shared.known_segment == first_;
    double coef = shared.known_coef;
    __syncthreads();
    if (!is_known && threadIdx.x < kWarpSize) coef = coef_of_long(first_);
    if (threadIdx.x != 0) return;
    step_.chunk_coefs[index_] = coef;
    shared.is_shared = true;
    shared.factor = decision_.inv_scale * coef;
    shared.known_tensor = chunk_.tensor;
    shared.known_segment = first_;
    shared.known_coef = coef;
  }

  // For a segment no longer than a chunk: it has one part or two.
  __device__ double coef_of_short(int64_t segment) const {
    const int64_t part = first_part(segment);
    SegmentSums sums = load(part);
    if (segments_.num_chunks(segment) > 1) {
      const SegmentSums second = load(part + 1);
      sums.grads += second.grads;
      sums.params += second.params;
    }
    return segment_coef(step_, decision_, shape_, sums);
  }

  // For a segment of any length. All threads of a warp call it. Lane 0 gets it.
  __device__ double coef_of_long(int64_t segment) const {
    const int64_t part = first_part(segment), count = segments_.num_chunks(segment);
    SegmentSums sums{};
    sums.grads = warp_exact_total(count, [&](int64_t i) { return load(part + i).grads; });
    if (kind_ == SegmentKind::kRows) {
      sums.params = warp_exact_total(count, [&](int64_t i) { return load(part + i).params; });
    }
    return segment_coef(step_, decision_, shape_, sums);
  }

  __device__ int64_t first_part(int64_t segment) const {
    return segments_.part(segment, segments_.first_chunk(segment));
  }

  __device__ SegmentSums load(int64_t part) const {
    if (kind_ == SegmentKind::kTensors) return {__ldcg(step_.chunk_sums + part), 0};
    return {__ldcg(&step_.part_sums[part].grads), __ldcg(&step_.part_sums[part].params)};
  }

  const StepParams& step_;
  const Decision& decision_;
  const int64_t index_;
  const Chunk chunk_;
  const TensorShape& shape_;
  const SegmentKind kind_;
  const Segments segments_;
  const int64_t first_, last_;
};

}  // namespace fusedopt::cuda
