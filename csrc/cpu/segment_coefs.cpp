#include "cpu/segment_coefs.h"

#include "cpu/grad_norm.h"

namespace fusedopt::cpu {

namespace {

// The sum of squares of a part of a row.
template <class value_t>
FUSEDOPT_INLINE double sum_of_part(const value_t* values, int64_t count) {
  using T = opmath_t<value_t>;
  Lanes<SumOfSquares, kTensorLanes, double> sums;
  for (int64_t first = 0; first < count; first += kRunSize) {
    Lanes<SumOfSquares, kTensorLanes, T> run;
    run.add(Term<SumOfSquares, value_t, T>{values + first}, std::min(count - first, kRunSize));
    sums.add_lanes(run);
  }
  const double sum = sums.fold();
  if (std::is_same_v<T, double> || SumOfSquares::is_in_range(sum)) return sum;
  Lanes<SumOfSquares, kTensorLanes, double> again;
  again.add(Term<SumOfSquares, value_t, double>{values}, count);
  return again.fold();
}

template <class param_t, class grad_t>
struct PartMeasure {
  static FUSEDOPT_INLINE void run(const param_t* params, const grad_t* grads, int64_t count,
                                  SegmentSums* sums) {
    *sums = {sum_of_part(grads, count), sum_of_part(params, count)};
  }
};

template <class grad_t>
struct PartScale {
  using T = opmath_t<grad_t>;
  static FUSEDOPT_INLINE void run(const grad_t* grads, int64_t count, double factor, T* result) {
    for (int64_t i = 0; i < count; ++i) result[i] = scaled<T>(widen(grads[i]), factor);
  }
};

}  // namespace

void measure_parts(const StepParams& step, Isa isa, int64_t index) {
  const Chunk chunk = step.chunks[index];
  const TensorShape& shape = step.shapes[chunk.tensor];
  const Segments segments(step, chunk.tensor, SegmentKind::kRows);
  visit_storage(shape.param, [&](auto param) {
    using param_t = type_of<decltype(param)>;
    visit_storage_beside<param_t>(shape.grad, [&](auto grad) {
      using grad_t = type_of<decltype(grad)>;
      const void* const data = step.pointers[chunk.tensor * step.num_pointers];
      const auto* params = static_cast<const param_t*>(data) + chunk.begin();
      const auto* grads = static_cast<const grad_t*>(step.grads[chunk.tensor]) + chunk.begin();
      PartWalk part(segments, chunk.begin(), chunk.size(shape.numel));
      for (; part.is_there(); part.next()) {
        run_best<PartMeasure<param_t, grad_t>>(
            isa, params + part.first, grads + part.first, part.last - part.first,
            &step.part_sums[segments.part(part.segment, chunk.index)]);
      }
    });
  });
}

SegmentCoefs::SegmentCoefs(const StepParams& step, Isa isa, const Decision& decision)
    : step_(step), isa_(isa), decision_(decision), kind_(segment_kind(step.options.limit.kind)) {}

Segments SegmentCoefs::segments_of(uint32_t tensor) const { return Segments(step_, tensor, kind_); }

bool SegmentCoefs::is_shared(int64_t index) const {
  const Chunk chunk = step_.chunks[index];
  if (kind_ != SegmentKind::kRows || is_unclipped(step_, chunk.tensor)) return true;
  const Segments segments = segments_of(chunk.tensor);
  const int64_t last = chunk.begin() + chunk.size(step_.shapes[chunk.tensor].numel) - 1;
  return segments.at(chunk.begin()) == segments.at(last);
}

std::optional<double> SegmentCoefs::segment_factor(int64_t index) {
  if (!is_shared(index)) return std::nullopt;
  const Chunk chunk = step_.chunks[index];
  const double coef = coef_of(chunk.tensor, segments_of(chunk.tensor).at(chunk.begin()));
  const double factor = decision_.inv_scale * coef;
  if (kind_ != SegmentKind::kNone) step_.chunk_coefs[index] = coef;
  const bool is_double = step_.shapes[chunk.tensor].param == Storage::kFloat64;
  if (!is_double && is_tiny<float>(factor)) return std::nullopt;
  return factor;
}

const void* SegmentCoefs::scaled_grads(int64_t index) {
  scaled_.resize(kChunkSize);
  const Chunk chunk = step_.chunks[index];
  const TensorShape& shape = step_.shapes[chunk.tensor];
  const Segments segments = segments_of(chunk.tensor);
  visit_storage(shape.grad, [&](auto grad) {
    using grad_t = type_of<decltype(grad)>;
    using T = opmath_t<grad_t>;
    const auto* grads = static_cast<const grad_t*>(step_.grads[chunk.tensor]) + chunk.begin();
    T* const result = reinterpret_cast<T*>(scaled_.data());
    double smallest = decision_.clip_coef;
    PartWalk part(segments, chunk.begin(), chunk.size(shape.numel));
    for (; part.is_there(); part.next()) {
      const double coef = coef_of(chunk.tensor, part.segment);
      smallest = smaller(coef, smallest);
      run_best<PartScale<grad_t>>(isa_, grads + part.first, part.last - part.first,
                                  decision_.inv_scale * coef, result + part.first);
    }
    if (kind_ != SegmentKind::kNone) step_.chunk_coefs[index] = smallest;
  });
  return scaled_.data();
}

double SegmentCoefs::coef_of(uint32_t tensor, int64_t segment) {
  if (is_unclipped(step_, tensor)) return 1.0;
  if (kind_ == SegmentKind::kNone) return decision_.clip_coef;
  if (tensor == tensor_ && segment == segment_) return coef_;
  tensor_ = tensor;
  segment_ = segment;
  return coef_ = segment_coef(step_, decision_, step_.shapes[tensor], sums_of(tensor, segment));
}

SegmentSums SegmentCoefs::sums_of(uint32_t tensor, int64_t segment) const {
  const Segments segments = segments_of(tensor);
  const int64_t first = segments.part(segment, segments.first_chunk(segment));
  const int64_t count = segments.num_chunks(segment);
  const auto total = [&](auto of) { return exact_total_of(first, count, of); };
  if (kind_ == SegmentKind::kTensors) {
    return {total([&](int64_t part) { return step_.chunk_sums[part]; }), 0};
  }
  return {total([&](int64_t part) { return step_.part_sums[part].grads; }),
          total([&](int64_t part) { return step_.part_sums[part].params; })};
}

}  // namespace fusedopt::cpu
