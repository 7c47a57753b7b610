// Clips that look at every tensor, or every unit (a row, a filter), by itself.
#pragma once

#include <algorithm>

#include "cuda/block.cuh"
#include "cuda/vector.cuh"

namespace fusedopt::cuda {

// Calls body(a Slice of the parameter, a Slice of its gradient).
template <class Body>
__device__ __forceinline__ void visit_both(const TensorEntry& tensor, const void* grad, Chunk chunk,
                                           Body&& body) {
  const int64_t begin = chunk.begin();
  if (tensor.param_dtype == Dtype::kFloat32) {
    return body(Slice<float>(tensor.param, begin), Slice<float>(grad, begin));
  }
  if (tensor.param_dtype == Dtype::kFloat64) {
    return body(Slice<double>(tensor.param, begin), Slice<double>(grad, begin));
  }
  const Slice<raw16> params(tensor.param, begin);
  if (tensor.grad_dtype == Dtype::kFloat32) return body(params, Slice<float>(grad, begin));
  body(params, Slice<raw16>(grad, begin));
}

// The squares of a chunk's units: a warp for each.
__device__ inline void measure_units(const StepParams& step, int64_t index) {
  const Chunk chunk = step.chunks[index];
  const TensorEntry& tensor = step.tensors[chunk.tensor];
  const void* grad = step.grads[chunk.tensor];
  if (grad == nullptr) return;
  const Units units = step.own_clips.units[chunk.tensor];
  const Format format(tensor);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  visit_both(tensor, grad, chunk, [&](const auto& params, const auto& grads) {
    int turn = 0;
    for (Piece piece(units, chunk.begin(), chunk.size(tensor.numel)); piece.is_there();
         piece.next(), ++turn) {
      if (turn % (kThreads / kWarpSize) != warp) continue;
      UnitSums sums{};
#pragma unroll 4
      for (int i = static_cast<int>(piece.first) + lane; i < piece.last; i += kWarpSize) {
        sums.grads = SumOfSquares::add(sums.grads, format.widen(grads.template load<1>(i).at[0]));
        sums.params =
            SumOfSquares::add(sums.params, format.widen(params.template load<1>(i).at[0]));
      }
      sums = {warp_total<SumOfSquares>(sums.grads), warp_total<SumOfSquares>(sums.params)};
      if (lane == 0) step.own_clips.unit_sums[units.first + piece.unit + chunk.index] = sums;
    }
  });
}

// The norms of all tensors, by a block, once all chunks are measured. The sums come from other
// blocks: past the L1 cache.
__device__ inline void measure_tensors(const StepParams& step) {
  double* const norms = step.own_clips.tensor_norms;
  const auto sums_of = [&](int64_t t) {
    return step.chunk_sums + step.own_clips.units[t].first_chunk;
  };
  visit_tensors(
      step, [&](int64_t t) { norms[t] = sqrt(__ldcg(sums_of(t))); },
      [&](int64_t t) {
        const int64_t count = chunks_of(step.tensors[t].numel);
        double sum = 0;
        for (int64_t i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
          sum += __ldcg(sums_of(t) + i);
        }
        sum = warp_total<SumOfSquares>(sum);
        if (threadIdx.x % kWarpSize == 0) norms[t] = sqrt(sum);
      });
}

struct Smallest {
  __device__ static double combine(double a, double b) { return smaller(a, b); }
};

// The smallest coefficient of a step, in thread 0 of a block, once all chunks are updated.
__device__ inline double smallest_coef(const StepParams& step, const Decision& decision) {
  double smallest = decision.clip_coef;
  if (step.own_clips.tensor_norms != nullptr) {
    for (int64_t t = threadIdx.x; t < step.num_tensors; t += kThreads) {
      smallest = coef_with_tensor(step, decision, t, smallest);
    }
  }
  if (step.own_clips.coefs != nullptr) {
    for (int64_t i = threadIdx.x; i < step.num_chunks; i += kThreads) {
      if (step.grads[step.chunks[i].tensor] == nullptr) continue;
      smallest = smaller(__ldcg(step.own_clips.chunk_coefs + i), smallest);
    }
  }
  return block_total<Smallest>(smallest);
}

// What a block knows of a chunk's units, in shared memory.
struct ChunkUnits {
  int64_t size;         // elements of each
  int64_t begun;        // elements of the first that lie before the chunk
  const double* coefs;  // from the first on
  int64_t known;        // the unit that the block has met last, from Units::first on; -1: none
  double known_coef;    // a long one has many chunks

  // The coefficient of the unit that an element of the chunk lies in.
  __device__ __forceinline__ double coef_of(int i) const {
    constexpr int64_t kLongest = INT32_MAX;  // a chunk meets at most two units of that length
    const int64_t place = begun + i;
    return coefs[size > kLongest ? (place < size ? 0 : 1)
                                 : static_cast<uint32_t>(place) / static_cast<uint32_t>(size)];
  }
};

// The coefficients of a chunk's units, by a block. Two chunks that share a unit have a copy each,
// so that no block reads what another one writes.
class UnitCoefs {
 public:
  __device__ UnitCoefs(const StepParams& step, const Decision& decision, Chunk chunk)
      : step_(step),
        decision_(decision),
        units_(step.own_clips.units[chunk.tensor]),
        begin_(chunk.begin()),
        coefs_(step.own_clips.coefs + units_.first + chunk.index) {
    const int64_t numel = step.tensors[chunk.tensor].numel;
    first_ = begin_ / units_.size;
    last_ = (begin_ + chunk.size(numel) - 1) / units_.size;
  }

  // Of a chunk, the smallest is left as well.
  __device__ void leave(ChunkUnits& shared, int64_t index) const {
    if (units_.size <= kChunkSize) {
      for (int64_t unit = first_ + threadIdx.x; unit <= last_; unit += kThreads) {
        coefs_[unit] = coef_of_short(unit);
      }
    } else {  // one or two, by a warp each
      const int64_t unit = first_ + threadIdx.x / kWarpSize;
      if (unit <= last_) {
        const bool known = shared.known == units_.first + unit;
        const double coef = known ? shared.known_coef : coef_of_long(unit);
        if (threadIdx.x % kWarpSize == 0) coefs_[unit] = coef;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      shared = {units_.size, begin_ - first_ * units_.size, coefs_ + first_, units_.first + last_,
                coefs_[last_]};
    }
    double smallest = decision_.clip_coef;
    for (int64_t unit = first_ + threadIdx.x; unit <= last_; unit += kThreads) {
      smallest = smaller(coefs_[unit], smallest);
    }
    smallest = block_total<Smallest>(smallest);
    if (threadIdx.x == 0) step_.own_clips.chunk_coefs[index] = smallest;
  }

 private:
  // Parts of it are in one chunk or in two.
  __device__ double coef_of_short(int64_t unit) const {
    const UnitSums* const parts = parts_of(unit);
    UnitSums sums{__ldcg(&parts->grads), __ldcg(&parts->params)};
    if (units_.chunks_of(unit) > 1) {
      sums.grads += __ldcg(&parts[1].grads);
      sums.params += __ldcg(&parts[1].params);
    }
    return coef_of(sums);
  }

  // By a warp.
  __device__ double coef_of_long(int64_t unit) const {
    const UnitSums* const parts = parts_of(unit);
    const int64_t count = units_.chunks_of(unit);
    UnitSums sums{};
    for (int64_t i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
      sums.grads += __ldcg(&parts[i].grads);
      sums.params += __ldcg(&parts[i].params);
    }
    return coef_of({warp_total<SumOfSquares>(sums.grads), warp_total<SumOfSquares>(sums.params)});
  }

  __device__ const UnitSums* parts_of(int64_t unit) const {
    return step_.own_clips.unit_sums + units_.first + unit + units_.first_chunk_of(unit);
  }
  __device__ double coef_of(const UnitSums& sums) const {
    return coef_of_unit(step_.options, decision_, sums.grads, sums.params);
  }

  const StepParams& step_;
  const Decision& decision_;
  const Units units_;
  const int64_t begin_;
  double* const coefs_;  // by the units' numbers in the tensor
  int64_t first_, last_;
};

}  // namespace fusedopt::cuda
