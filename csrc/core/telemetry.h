// Telemetry: what a step finds out about every parameter on its way, for the user to read later.
#pragma once

#include <cmath>
#include <cstdint>
#include <iterator>
#include <type_traits>

#include "core/decision.h"
#include "math/convert.h"
#include "math/inline.h"

namespace fusedopt {

// A magnitude as an unsigned integer: they are in the same order, inf above all finite ones and nan
// above inf, and integers have a maximum that needs no care.
template <class scalar_t>
using magnitude_bits =
    std::conditional_t<sizeof(scalar_t) == 2, uint16_t,
                       std::conditional_t<sizeof(scalar_t) == 4, uint32_t, uint64_t>>;

template <class scalar_t>
FUSEDOPT_INLINE magnitude_bits<scalar_t> magnitude(scalar_t value) {
  using bits_t = magnitude_bits<scalar_t>;
  return bit_cast<bits_t>(value) & static_cast<bits_t>(static_cast<bits_t>(~bits_t{0}) >> 1);
}

// Of one chunk, beside the sum of its gradients' squares.
struct ChunkMeasures {
  double grad_max;  // of the gradients as they are, before unscaling
  double infs, nans;
  double update_squares;  // the sum, of what was added to the elements
  double param_squares;   // the sum, of the elements before
};

// Of one parameter in one step. All are doubles, so that Python reads a ring of rows as one float64
// tensor.
struct ParamRow {
  double grad_norm, grad_max;  // after unscaling, before clipping
  double infs, nans;
  double update_norm;
  double param_norm;  // before the step
};

// Their names, in order, for front ends.
inline constexpr const char* kParamColumns[] = {"grad_norm", "grad_max",    "infs",
                                                "nans",      "update_norm", "param_norm"};
static_assert(sizeof(ParamRow) == std::size(kParamColumns) * sizeof(double));

// The columns of a step's row, before the learning rates of the groups.
inline constexpr const char* kStepColumnNames[] = {"grad_norm", "clip_coef", "skipped"};
inline constexpr int kStepColumns = std::size(kStepColumnNames);

// From the sums over all chunks of a parameter. A step that is skipped doesn't look at parameters.
FUSEDOPT_INLINE ParamRow param_row(double grad_squares, const ChunkMeasures& measures,
                                   const Decision& decision) {
  const double inv_scale = decision.inv_scale;
  return {std::sqrt(grad_squares) * inv_scale,
          measures.grad_max * inv_scale,
          measures.infs,
          measures.nans,
          decision.skip ? 0 : std::sqrt(measures.update_squares),
          decision.skip ? NAN : std::sqrt(measures.param_squares)};
}

// Of a parameter that had no gradient.
FUSEDOPT_INLINE ParamRow absent_row() { return {NAN, NAN, NAN, NAN, NAN, NAN}; }

}  // namespace fusedopt
