// The clip coefficients of segments on the CPU.
#pragma once

#include <optional>
#include <vector>

#include "core/segments.h"
#include "cpu/isa.h"

namespace fusedopt::cpu {

// Measures the SegmentSums of every part of a chunk.
void measure_parts(const StepParams& step, Isa isa, int64_t chunk);

// Computes the coefficients of segments. Every thread has its own object.
class SegmentCoefs {
 public:
  SegmentCoefs(const StepParams& step, Isa isa, const Decision& decision);

  // The factor that all gradients of a chunk share. nullopt if they lie in several segments, or if
  // the factor is tiny: then use scaled_grads().
  std::optional<double> shared_factor(int64_t chunk) {
    const bool is_simple = kind_ == SegmentKind::kNone && !step_.has_unclipped &&
                           !is_tiny<float>(decision_.grad_factor);
    return is_simple ? decision_.grad_factor : segment_factor(chunk);
  }

  // The chunk's gradients, unscaled and clipped, in the type that the parameter is computed in.
  // They are valid until the next call.
  const void* scaled_grads(int64_t chunk);

 private:
  std::optional<double> segment_factor(int64_t chunk);
  bool is_shared(int64_t chunk) const;
  double coef_of(uint32_t tensor, int64_t segment);
  SegmentSums sums_of(uint32_t tensor, int64_t segment) const;
  Segments segments_of(uint32_t tensor) const;

  const StepParams& step_;
  const Isa isa_;
  const Decision decision_;
  const SegmentKind kind_;
  std::vector<double> scaled_;
  // The coefficient of the last segment is remembered, as a long segment has many chunks.
  uint32_t tensor_ = UINT32_MAX;
  int64_t segment_ = -1;
  double coef_ = 0;
};

}  // namespace fusedopt::cpu
