#include "cpu/measure.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/dispatch.h"
#include "cpu/grad_norm.h"
#include "cpu/segments.h"

namespace fusedopt::cpu {

namespace {

// The sum of squares and the largest magnitude, row by row, from one read.
template <class param_t, class grad_t>
struct ChunkMeasure {
  static FUSEDOPT_INLINE void run(const grad_t* grads, int64_t count, double* sum,
                                  magnitude_bits<grad_t>* largest) {
    constexpr int64_t kRow = kNormLanes<param_t>;
    Lanes<SumOfSquares, kRow> squares;
    magnitude_bits<grad_t> result = 0;
    for (int64_t first = 0; first < count; first += kRow) {
      const int64_t row = std::min(count - first, kRow);
      squares.add_row(Term<SumOfSquares, grad_t>{grads}, first, row);
      for (int64_t i = first; i < first + row; ++i) result = std::max(result, magnitude(grads[i]));
    }
    *sum = squares.fold();
    *largest = result;
  }
};

// Leaves nothing of the lanes.
template <class T>
struct FoldLanes {
  static FUSEDOPT_INLINE void run(T* lanes, int64_t width, double* result) {
    while (width > kTensorLanes) {
      width /= 2;
#pragma GCC ivdep
      for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    Lanes<SumOfSquares, kTensorLanes> total;
    total.add([=](int64_t lane) { return static_cast<double>(lanes[lane]); }, width);
    *result = total.fold();
  }
};

template <class grad_t>
void count_nonfinite(const grad_t* grads, int64_t count, ChunkMeasures& measures) {
  for (int64_t i = 0; i < count; ++i) {
    const auto value = widen(grads[i]);
    measures.infs += std::isinf(value) ? 1 : 0;
    measures.nans += std::isnan(value) ? 1 : 0;
  }
}

// Only a chunk whose sum is not finite holds inf or nan: hardly ever is one read again.
template <class grad_t>
void finish_measures(const StepParams& step, int64_t chunk, const grad_t* grads, int64_t count,
                     magnitude_bits<grad_t> largest) {
  ChunkMeasures& measures = step.telemetry.chunks[chunk];
  measures.grad_max = widen(bit_cast<grad_t>(largest));
  measures.infs = measures.nans = 0;
  if (!std::isfinite(step.chunk_sums[chunk])) count_nonfinite(grads, count, measures);
}

}  // namespace

void measure_grads(const StepParams& step, Isa isa, int64_t chunk) {
  if (step.own_clips.coefs != nullptr) measure_units(step, isa, chunk);
  visit_grads(step, chunk, [&](auto types, const auto* grads, int64_t count) {
    using param_t = typename decltype(types)::param_t;
    using grad_t = typename decltype(types)::grad_t;
    if (step.telemetry.chunks != nullptr) {
      magnitude_bits<grad_t> largest;
      run_best<ChunkMeasure<param_t, grad_t>>(isa, grads, count, &step.chunk_sums[chunk], &largest);
      return finish_measures(step, chunk, grads, count, largest);
    }
    visit_norm(step.options.norm_type, [&](auto norm) {
      run_best<ChunkNorm<decltype(norm), param_t, grad_t>>(isa, grads, count,
                                                           &step.chunk_sums[chunk]);
    });
  });
}

void measure_tensors(const StepParams& step) {
  for (int64_t t = 0; t < step.num_tensors; ++t) {
    const int64_t count = chunks_of(step.tensors[t].numel);
    step.own_clips.tensor_norms[t] = std::sqrt(total_of<SumOfSquares>(
        step.own_clips.units[t].first_chunk, count, [&](int64_t i) { return step.chunk_sums[i]; }));
  }
}

double total_of_lanes(Isa isa, float* lanes, int64_t width) {
  double result;
  run_best<FoldLanes<float>>(isa, lanes, width, &result);
  return result;
}

double total_of_lanes(Isa isa, double* lanes, int64_t width) {
  double result;
  run_best<FoldLanes<double>>(isa, lanes, width, &result);
  return result;
}

double total_of_chunks(const StepParams& step) {
  return visit_norm(step.options.norm_type, [&](auto norm) {
    return total<decltype(norm)>(step.chunk_sums, step.num_chunks);
  });
}

void observe(const StepParams& step, const Decision& decision) {
  const AdaptiveClip& clip = step.options.clip;
  const double norm = decision.grad_norm;
  if (clip.kind == ClipKind::kZScore) return ZScore(clip).observe(norm);
  if (clip.kind == ClipKind::kPerTensor) {
    for (int64_t t = 0; t < step.num_tensors; ++t) observe_tensor(step, decision, t);
  }
  if (clip.kind != ClipKind::kPercentile) return;
  const Percentile percentile(clip);
  percentile.observe(norm);
  std::vector<double> norms(percentile.norms(), percentile.norms() + percentile.size());
  const auto lower = norms.begin() + percentile.rank();
  std::nth_element(norms.begin(), lower, norms.end());
  const bool is_last = lower + 1 == norms.end();
  percentile.set_limit(*lower, is_last ? *lower : *std::min_element(lower + 1, norms.end()));
}

double smallest_coef(const StepParams& step, const Decision& decision) {
  double smallest = decision.clip_coef;
  for (int64_t t = 0; t < step.num_tensors && step.own_clips.tensor_norms != nullptr; ++t) {
    smallest = coef_with_tensor(step, decision, t, smallest);
  }
  for (int64_t i = 0; i < step.num_chunks && step.own_clips.coefs != nullptr; ++i) {
    if (step.grads[step.chunks[i].tensor] == nullptr) continue;
    smallest = smaller(step.own_clips.chunk_coefs[i], smallest);
  }
  return smallest;
}

ParamRow param_row(const StepParams& step, int64_t tensor, const Decision& decision) {
  if (step.grads[tensor] == nullptr) return absent_row();
  const ChunkMeasures* const chunks = step.telemetry.chunks;
  const int64_t first = step.first_chunks[tensor], count = chunks_of(step.tensors[tensor].numel);
  const auto sum = [&](double ChunkMeasures::* field) {
    return total_of<SumOfSquares>(first, count, [=](int64_t i) { return chunks[i].*field; });
  };
  ChunkMeasures measures{};
  measures.grad_max = total_of<MaxAbs>(first, count, [=](int64_t i) { return chunks[i].grad_max; });
  measures.infs = sum(&ChunkMeasures::infs);
  measures.nans = sum(&ChunkMeasures::nans);
  if (!decision.skip) {
    measures.update_squares = sum(&ChunkMeasures::update_squares);
    measures.param_squares = sum(&ChunkMeasures::param_squares);
  }
  const double grad_squares =
      total_of<SumOfSquares>(first, count, [&](int64_t i) { return step.chunk_sums[i]; });
  return fusedopt::param_row(grad_squares, measures, decision);
}

}  // namespace fusedopt::cpu
