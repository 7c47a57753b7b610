#include "cpu/measure.h"

#include <algorithm>
#include <cmath>

#include "core/dispatch.h"
#include "core/message.h"
#include "cpu/grad_norm.h"
#include "cpu/isa.h"
#include "cpu/passes.h"
#include "cpu/segment_coefs.h"
#include "cpu/team.h"
#include "cpu/walk.h"

namespace fusedopt::cpu {

namespace {

// Measures the sum of squares and the largest magnitude in one read of the gradients.
template <int64_t kLanes, class grad_t>
struct ChunkMeasure {
  static FUSEDOPT_INLINE void run(const grad_t* grads, int64_t count, double* sum,
                                  magnitude_bits<grad_t>* largest) {
    using T = opmath_t<grad_t>;
    Lanes<SumOfSquares, kLanes, T> squares;
    magnitude_bits<grad_t> result = 0;
    for (int64_t first = 0; first < count; first += kLanes) {
      const int64_t row = std::min(count - first, kLanes);
      squares.add_row(Term<SumOfSquares, grad_t, T>{grads}, first, row,
                      GradsAhead<kLanes, grad_t>{grads});
      for (int64_t i = first; i < first + row; ++i) result = std::max(result, magnitude(grads[i]));
    }
    *sum = squares.fold();
    *largest = result;
  }
};

// Measures a chunk again, in float64 lanes, if its squares are out of range in float32 lanes.
template <class Norm, int64_t kLanes, class grad_t>
void look_again(Isa isa, const grad_t* grads, int64_t count, double* sum) {
  if constexpr (sizeof(opmath_t<grad_t>) == sizeof(float)) {
    if (Norm::is_in_range(*sum)) return;
    run_best<ChunkNorm<Norm, kLanes, grad_t, double>>(isa, grads, count, sum);
  }
}

template <class grad_t>
void count_nonfinite(const grad_t* grads, int64_t count, ChunkMeasures& measures) {
  for (int64_t i = 0; i < count; ++i) {
    const auto value = widen(grads[i]);
    measures.infs += std::isinf(value) ? 1 : 0;
    measures.nans += std::isnan(value) ? 1 : 0;
  }
}

// A chunk with inf or nan has a sum that is not finite. Only then is the chunk read again to count
// them.
template <class grad_t>
void finish_measures(const StepParams& step, int64_t chunk, const grad_t* grads, int64_t count,
                     magnitude_bits<grad_t> largest) {
  ChunkMeasures& measures = step.chunk_measures[chunk];
  measures.grad_max = widen(bit_cast<grad_t>(largest));
  measures.infs = measures.nans = 0;
  if (!std::isfinite(step.chunk_sums[chunk])) count_nonfinite(grads, count, measures);
}

// Calls body(lanes, grads, count): the number of lanes as a std::integral_constant, a pointer to
// the chunk's gradients, and their number.
template <class Body>
void visit_chunk(const StepParams& step, int64_t index, Body body) {
  const Chunk chunk = step.chunks[index];
  const TensorShape& shape = step.shapes[chunk.tensor];
  visit_storage(shape.param, [&](auto param) {
    using param_t = type_of<decltype(param)>;
    visit_storage_beside<param_t>(shape.grad, [&](auto grad) {
      using grad_t = type_of<decltype(grad)>;
      const auto* grads = static_cast<const grad_t*>(step.grads[chunk.tensor]) + chunk.begin();
      body(std::integral_constant<int64_t, kNormLanes<param_t>>{}, grads, chunk.size(shape.numel));
    });
  });
}

}  // namespace

void measure_chunk(const StepParams& step, int64_t index) {
  const Isa isa = best_isa();
  if (step.part_sums != nullptr) measure_parts(step, isa, index);
  visit_chunk(step, index, [&](auto lanes, const auto* grads, int64_t count) {
    using grad_t = std::remove_cv_t<std::remove_pointer_t<decltype(grads)>>;
    double* const sum = &step.chunk_sums[index];
    if (step.chunk_measures != nullptr) {
      magnitude_bits<grad_t> largest;
      run_best<ChunkMeasure<lanes(), grad_t>>(isa, grads, count, sum, &largest);
      look_again<SumOfSquares, lanes()>(isa, grads, count, sum);
      return finish_measures(step, index, grads, count, largest);
    }
    visit_norm(step.options.norm_type, [&](auto norm) {
      using Norm = decltype(norm);
      run_best<ChunkNorm<Norm, lanes(), grad_t, opmath_t<grad_t>>>(isa, grads, count, sum);
      look_again<Norm, lanes()>(isa, grads, count, sum);
    });
  });
}

double total_of_chunks(const StepParams& step) {
  if (step.options.norm_type == NormType::kL2) {
    return exact_total_of(0, step.num_chunks, [&](int64_t chunk) {
      return counted_sum(step, chunk, step.chunk_sums[chunk]);
    });
  }
  return total_of<MaxAbs>(0, step.num_chunks,
                          [&](int64_t chunk) { return step.chunk_sums[chunk]; });
}

void measure(const StepParams& step, const Team& team) {
  Walk walk(step, Order::kForward, Arrays::kGrads);
  in_turn(team, Together{[&] { walk.run([&](int64_t i) { measure_chunk(step, i); }); }});
}

void reduce(const StepParams& step) {
  const IeeeArithmetic ieee;
  step.control->sum_of_squares = total_of_chunks(step);
}

void write_message(const StepParams& step, const bool* counted, int64_t* message) {
  for (int64_t i = 0; i < step.num_chunks; ++i) {
    const double sum = step.chunk_sums[i];
    // Also of what is counted elsewhere: a copy that is broken here makes all ranks skip.
    if (!is_finite(sum)) {
      ++message[std::isnan(sum) ? kNans : kInfs];
    } else if (counted[i]) {
      const LimbParts parts(sum);
      for (int k = 0; k < 3; ++k) message[parts.first + k] += static_cast<int64_t>(parts.parts[k]);
    }
  }
}

}  // namespace fusedopt::cpu
