// The workers that end a step on the CPU: a single thread. See core/finish.h.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "core/params.h"
#include "cpu/grad_norm.h"
#include "cpu/measure.h"

namespace fusedopt::cpu {

// Adds up the chunks of one tensor.
class TensorSum {
 public:
  TensorSum(int64_t first, int64_t count) : first_(first), count_(count) {}

  template <class Norm, class Value>
  double of(Value value) const {
    return total_of<Norm>(first_, count_, value);
  }
  template <class Value>
  double exact(Value value) const {
    return exact_total_of(first_, count_, value);
  }

 private:
  int64_t first_, count_;
};

struct OneWorker {
  template <class Body>
  void once(Body body) const {
    body();
  }

  template <class Body>
  void each(int64_t count, Body body) const {
    for (int64_t i = 0; i < count; ++i) body(i);
  }

  template <class Gather, class Body>
  void each_tensor(const StepParams& step, Gather gather, Body body) const {
    for (int64_t t = 0; t < step.num_tensors; ++t) {
      const TensorShape& shape = step.shapes[t];
      body(t, gather(t, TensorSum(shape.first_chunk, chunks_of(shape.numel))));
    }
  }

  double total(const StepParams& step) const { return total_of_chunks(step); }

  template <class Value>
  double smallest(int64_t count, double start, Value value) const {
    for (int64_t i = 0; i < count; ++i) start = smaller(value(i), start);
    return start;
  }

  std::pair<double, double> ranked(const double* norms, int64_t size, int64_t rank) const {
    std::vector<double> sorted(norms, norms + size);
    const auto lower = sorted.begin() + rank;
    std::nth_element(sorted.begin(), lower, sorted.end());
    const bool is_last = lower + 1 == sorted.end();
    return {*lower, is_last ? *lower : *std::min_element(lower + 1, sorted.end())};
  }

  template <class T>
  static T load(const T* value) {
    return *value;
  }

  static bool has_advanced(const TensorShape&) { return false; }
};

}  // namespace fusedopt::cpu
