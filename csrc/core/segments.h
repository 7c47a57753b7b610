// Segments: elements that share one norm and one clip coefficient. For a limit of tensors every
// tensor is one segment. For a limit of rows every row of a tensor is one segment.
//
// A part is the elements of one segment that lie in one chunk. If a tensor is one segment, its
// parts are its chunks, and chunk_sums holds their sums. For rows, the norm pass adds up each part
// separately and stores it at the index `first row + row + first chunk + chunk`. The index is
// unique: two neighboring chunks share at most one row.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/params.h"

namespace fusedopt {

enum class SegmentKind { kNone, kTensors, kRows };

FUSEDOPT_INLINE SegmentKind segment_kind(LimitKind limit) {
  switch (limit) {
    case LimitKind::kPerTensor:
      return SegmentKind::kTensors;
    case LimitKind::kUnit:
      return SegmentKind::kRows;
    case LimitKind::kFixed:
    case LimitKind::kPercentile:
    case LimitKind::kZScore:
      break;
  }
  return SegmentKind::kNone;
}

// The segments of one tensor.
class Segments {
 public:
  FUSEDOPT_INLINE Segments(const StepParams& step, uint32_t tensor, SegmentKind kind)
      : first_part_(step.shapes[tensor].first_chunk), size_(step.shapes[tensor].numel) {
    if (kind != SegmentKind::kRows) return;
    first_part_ += step.rows[tensor].first;
    size_ = step.rows[tensor].size;
  }

  FUSEDOPT_INLINE int64_t size() const { return size_; }
  FUSEDOPT_INLINE int64_t at(int64_t element) const { return element / size_; }
  FUSEDOPT_INLINE int64_t begin(int64_t segment) const { return segment * size_; }
  FUSEDOPT_INLINE int64_t end(int64_t segment) const { return (segment + 1) * size_; }

  // The chunks of the tensor that hold elements of the segment.
  FUSEDOPT_INLINE int64_t first_chunk(int64_t segment) const { return begin(segment) / kChunkSize; }
  FUSEDOPT_INLINE int64_t num_chunks(int64_t segment) const {
    return (end(segment) - 1) / kChunkSize - first_chunk(segment) + 1;
  }

  // The index of the part of this segment in this chunk of the tensor.
  FUSEDOPT_INLINE int64_t part(int64_t segment, int64_t chunk) const {
    return first_part_ + segment + chunk;
  }

 private:
  int64_t first_part_, size_;
};

// Walks over the parts that lie in one chunk.
struct PartWalk {
  int64_t segment;
  int64_t first, last;  // the part's elements in the chunk: [first, last)

  FUSEDOPT_INLINE PartWalk(const Segments& segments, int64_t begin, int64_t count)
      : segment(segments.at(begin)), first(0), size_(segments.size()), count_(count) {
    end_at(segments.end(segment) - begin);
  }
  FUSEDOPT_INLINE bool is_there() const { return first < count_; }
  FUSEDOPT_INLINE void next() {
    ++segment;
    first = last;
    end_at(first + size_);
  }

 private:
  FUSEDOPT_INLINE void end_at(int64_t end) { last = end < count_ ? end : count_; }
  int64_t size_, count_;
};

// The clip coefficient of one segment, from the sums of squares over its elements. Not for tensors
// that are not clipped.
FUSEDOPT_INLINE double segment_coef(const StepParams& step, const Decision& decision,
                                    const TensorShape& shape, SegmentSums sums) {
  const Limit& limit = step.options.limit;
  const double norm = std::sqrt(sums.grads) * decision.inv_scale;
  const double own = limit.kind == LimitKind::kPerTensor
                         ? PerTensor(limit).coef(shape.number, norm, decision.grad_norm)
                         : Unit(limit).coef(norm, std::sqrt(sums.params));
  return smaller(own, decision.clip_coef);
}

}  // namespace fusedopt
