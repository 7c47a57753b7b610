// Telemetry: measurements of every parameter that a step makes for the user to read later.
#pragma once

#include <cmath>
#include <cstdint>
#include <iterator>
#include <type_traits>

#include "core/decision.h"
#include "math/convert.h"
#include "math/inline.h"

namespace fusedopt {

// A magnitude's bits as an unsigned integer. The integers have the same order as the magnitudes:
// inf is above all finite ones, and nan is above inf. Their maximum needs no special case for nan.
template <class scalar_t>
using magnitude_bits =
    std::conditional_t<sizeof(scalar_t) == 2, uint16_t,
                       std::conditional_t<sizeof(scalar_t) == 4, uint32_t, uint64_t>>;

template <class scalar_t>
FUSEDOPT_INLINE magnitude_bits<scalar_t> magnitude(scalar_t value) {
  using bits_t = magnitude_bits<scalar_t>;
  return bit_cast<bits_t>(value) & static_cast<bits_t>(static_cast<bits_t>(~bits_t{0}) >> 1);
}

// Telemetry of one chunk, in addition to its entry in chunk_sums.
struct ChunkMeasures {
  double grad_max;        // largest magnitude of the gradients, before unscaling
  double infs, nans;      // how many gradients are inf, and nan
  double update_squares;  // sum of the squares of the elements' changes
  double param_squares;   // sum of the squares of the elements before the step
};

// Telemetry of one parameter in one step. All fields are doubles, so that Python reads a ring of
// rows as one float64 tensor.
struct ParamRow {
  double grad_norm, grad_max;  // after unscaling, before clipping
  double infs, nans;
  double update_norm;
  double param_norm;  // before the step
};

// The names of ParamRow's fields, in order, for front ends.
inline constexpr const char* kParamColumns[] = {"grad_norm", "grad_max",    "infs",
                                                "nans",      "update_norm", "param_norm"};
static_assert(sizeof(ParamRow) == std::size(kParamColumns) * sizeof(double));

// The columns of a step's row, before the learning rates of the groups.
inline constexpr const char* kStepColumnNames[] = {"grad_norm", "clip_coef", "skipped"};
inline constexpr int kStepColumns = std::size(kStepColumnNames);

// The row of a parameter, from the sums over all of its chunks. A skipped step reads no parameters:
// their norm is nan then.
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

// The row of a parameter without a gradient.
FUSEDOPT_INLINE ParamRow absent_row() { return {NAN, NAN, NAN, NAN, NAN, NAN}; }

}  // namespace fusedopt
