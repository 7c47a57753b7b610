// The coefficients of a chunk, in shared memory of the block that updates it.
#pragma once

#include <type_traits>

#include "core/coefficients.h"
#include "core/dispatch.h"
#include "core/trust.h"
#include "cuda/workers.cuh"
#include "rules/rule.h"

namespace fusedopt::cuda {

// What all elements of a chunk share, in the type that they are computed in.
template <class Rule, class T>
struct Factors {
  typename Rule::template Coefficients<T> coefficients;
  T grad_factor;

  __device__ explicit Factors(const Prepared<Rule>& prepared)
      : coefficients(rounded<Rule, T>(prepared.coefficients)),
        grad_factor(static_cast<T>(prepared.grad_factor)) {}
};

// The last tensor's coefficients. A block keeps them between chunks, as most tensors share the same
// coefficients.
template <class Rule>
struct CoefficientCache {
  uint32_t group;
  float scalars[kMaxScalars], advanced[kMaxScalars];  // before the step, and after
  double grad_factor, known_trust_ratio;
  Prepared<Rule> prepared;
  // Rounded here: of rounding in the loops, nvcc makes slow conversions for each element.
  Factors<Rule, float> float32;
  Factors<Rule, double> float64;
  RandomBits random;  // of the chunk

  template <class T>
  __device__ const Factors<Rule, T>& factors() const {
    if constexpr (std::is_same_v<T, double>) {
      return float64;
    } else {
      return float32;
    }
  }

  // Thread 0 calls it, between two barriers.
  __device__ void prepare_for(const StepParams& step, Chunk chunk, double factor) {
    const TensorShape& shape = step.shapes[chunk.tensor];
    const Pointers<Rule> pointers(step, chunk.tensor);
    float now[kMaxScalars] = {};
    pointers.load_scalars(now);
    const double trust_ratio = trust_ratio_of<Rule>(step, chunk.tensor);
    bool same = shape.group == group && factor == grad_factor;
    if constexpr (Rule::kHasTrustRatio) same = same && trust_ratio == known_trust_ratio;
    for (int k = 0; k < num_scalars<Rule>; ++k) same = same && now[k] == scalars[k];
    if (!same) {
      group = shape.group;
      grad_factor = factor;
      for (int k = 0; k < num_scalars<Rule>; ++k) scalars[k] = now[k];
      known_trust_ratio = trust_ratio;
      prepared = prepare<Rule>(step, group, now, factor, trust_ratio);
      float32 = Factors<Rule, float>(prepared);
      float64 = Factors<Rule, double>(prepared);
      for (int k = 0; k < num_scalars<Rule>; ++k) advanced[k] = now[k];
    }
    if (is_stochastic(shape)) random = random_bits<Rule>(prepared, shape, chunk);
    if (Rule::kIsTrustPass || !BlockWorkers::has_advanced(shape)) return;
    for (int k = 0; k < num_scalars<Rule>; ++k) *pointers.scalar(k) = advanced[k];
  }
};

}  // namespace fusedopt::cuda
