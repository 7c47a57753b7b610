#include "cpu/segments.h"

#include "cpu/grad_norm.h"

namespace fusedopt::cpu {

namespace {

// A piece of a unit.
template <class param_t, class grad_t>
struct PieceMeasure {
  static FUSEDOPT_INLINE void run(const param_t* params, const grad_t* grads, int64_t count,
                                  UnitSums* sums) {
    Lanes<SumOfSquares, kTensorLanes> of_grads, of_params;
    of_grads.add(Term<SumOfSquares, grad_t>{grads}, count);
    of_params.add(Term<SumOfSquares, param_t>{params}, count);
    *sums = {of_grads.fold(), of_params.fold()};
  }
};

template <class grad_t>
struct PieceScale {
  using T = opmath_t<grad_t>;
  static FUSEDOPT_INLINE void run(const grad_t* grads, int64_t count, T factor, T* scaled) {
    for (int64_t i = 0; i < count; ++i) scaled[i] = widen(grads[i]) * factor;
  }
};

}  // namespace

void measure_units(const StepParams& step, Isa isa, int64_t index) {
  const Chunk chunk = step.chunks[index];
  const TensorEntry& tensor = step.tensors[chunk.tensor];
  const Units& units = step.own_clips.units[chunk.tensor];
  visit_grads(step, index, [&](auto types, const auto* grads, int64_t count) {
    using param_t = typename decltype(types)::param_t;
    using grad_t = typename decltype(types)::grad_t;
    const auto* params = static_cast<const param_t*>(tensor.param) + chunk.begin();
    for (Piece piece(units, chunk.begin(), count); piece.is_there(); piece.next()) {
      run_best<PieceMeasure<param_t, grad_t>>(
          isa, params + piece.first, grads + piece.first, piece.last - piece.first,
          &step.own_clips.unit_sums[units.first + piece.unit + chunk.index]);
    }
  });
}

UnitScaler::UnitScaler(const StepParams& step, Isa isa, const Decision& decision)
    : step_(step),
      isa_(isa),
      decision_(decision),
      scaled_(step.own_clips.coefs == nullptr ? 0 : kChunkSize) {}

const void* UnitScaler::scale(int64_t index) {
  const Chunk chunk = step_.chunks[index];
  const Units& units = step_.own_clips.units[chunk.tensor];
  visit_grads(step_, index, [&](auto types, const auto* grads, int64_t count) {
    using grad_t = typename decltype(types)::grad_t;
    using T = typename decltype(types)::compute_t;
    T* const scaled = reinterpret_cast<T*>(scaled_.data());
    double smallest = decision_.clip_coef;
    for (Piece piece(units, chunk.begin(), count); piece.is_there(); piece.next()) {
      const double coef = coef_of(chunk.tensor, piece.unit);
      smallest = smaller(coef, smallest);
      const double factor = decision_.inv_scale * coef;
      run_best<PieceScale<grad_t>>(isa_, grads + piece.first, piece.last - piece.first,
                                   static_cast<T>(factor), scaled + piece.first);
    }
    step_.own_clips.chunk_coefs[index] = smallest;
  });
  return scaled_.data();
}

double UnitScaler::coef_of(uint32_t tensor, int64_t unit) {
  if (tensor == tensor_ && unit == unit_) return coef_;
  tensor_ = tensor;
  unit_ = unit;
  const Units& units = step_.own_clips.units[tensor];
  const int64_t first = units.first_chunk_of(unit), count = units.chunks_of(unit);
  const UnitSums* const sums = step_.own_clips.unit_sums + units.first + unit;
  const auto total = [&](double UnitSums::* field) {
    return total_of<SumOfSquares>(first, count, [=](int64_t i) { return sums[i].*field; });
  };
  return coef_ = coef_of_unit(step_.options, decision_, total(&UnitSums::grads),
                              total(&UnitSums::params));
}

}  // namespace fusedopt::cpu
