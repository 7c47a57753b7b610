// Limits of the gradient norm that adapt themselves: of the global one from the steps before, of
// every tensor's from its own, of every unit's (a row, a filter) from its weights. fusedopt/clip.py
// says where each comes from.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/inline.h"

namespace fusedopt {

// fusedopt/clip.py has the same numbers, and hands the arguments over in its fields' order.
enum class ClipKind : int { kFixed, kPercentile, kZScore, kPerTensor, kUnit };

inline constexpr int kMaxClipArguments = 4;

// What a step is to do, and what it knows of earlier ones. The state lies on the first device; the
// others get a copy of it for a step.
struct AdaptiveClip {
  ClipKind kind;
  double arguments[kMaxClipArguments];
  // count, mean or limit, variance; then the norms that a percentile is taken of. kPerTensor: count
  // and average of every tensor.
  double* state;
};

// A norm that is clipped to a limit: what it is multiplied by. nan is left to the global limit.
FUSEDOPT_INLINE double coefficient_to(double limit, double norm) {
  return norm > limit ? limit / norm : 1.0;
}

// The same as torch.nn.utils.clip_grad_norm_ has it; nan stays nan.
FUSEDOPT_INLINE double clip_coefficient(double limit, double norm) {
  if (limit == HUGE_VAL) return 1.0;
  const double coef = limit / (norm + 1e-6);
  return coef > 1.0 ? 1.0 : coef;
}

// Of a tensor's or a unit's own coefficient and that of all gradients.
FUSEDOPT_INLINE double smaller(double own, double shared) { return own < shared ? own : shared; }

struct ZScore {
  double alpha, threshold, warmup, eps;
  double* state;

  explicit FUSEDOPT_INLINE ZScore(const AdaptiveClip& clip)
      : alpha(clip.arguments[0]),
        threshold(clip.arguments[1]),
        warmup(clip.arguments[2]),
        eps(clip.arguments[3]),
        state(clip.state) {}
  FUSEDOPT_INLINE double& count() const { return state[0]; }
  FUSEDOPT_INLINE double& mean() const { return state[1]; }
  FUSEDOPT_INLINE double& variance() const { return state[2]; }  // times count, while warming up

  FUSEDOPT_INLINE double limit(double norm) const {
    if (count() < warmup) return HUGE_VAL;
    const double deviation = std::sqrt(variance());
    const double z = (norm - mean()) / (deviation + eps);
    if (!(z > threshold)) return HUGE_VAL;
    return mean() + (threshold * deviation) / (z / threshold);
  }

  FUSEDOPT_INLINE void observe(double norm) const {
    const double largest = limit(norm);
    const double clipped = norm < largest ? norm : largest;
    const bool warming_up = count() < warmup;
    count() += 1;
    if (warming_up) {  // Welford (1962)
      const double before = clipped - mean();
      mean() += before / count();
      variance() += before * (clipped - mean());
      if (count() >= warmup) variance() /= count();
      return;
    }
    mean() = alpha * mean() + (1 - alpha) * clipped;
    const double distance = clipped - mean();
    variance() = alpha * variance() + (1 - alpha) * (distance * distance);
  }
};

struct Percentile {
  double percentile, window, warmup;
  double* state;

  explicit FUSEDOPT_INLINE Percentile(const AdaptiveClip& clip)
      : percentile(clip.arguments[0]),
        window(clip.arguments[1]),
        warmup(clip.arguments[2]),
        state(clip.state) {}
  FUSEDOPT_INLINE double& count() const { return state[0]; }
  FUSEDOPT_INLINE double& known_limit() const { return state[1]; }
  FUSEDOPT_INLINE double* norms() const { return state + 3; }
  FUSEDOPT_INLINE int64_t size() const {  // of the norms that there are
    return static_cast<int64_t>(count() < window ? count() : window);
  }

  FUSEDOPT_INLINE double limit() const { return count() < warmup ? HUGE_VAL : known_limit(); }

  FUSEDOPT_INLINE void observe(double norm) const {
    norms()[static_cast<int64_t>(count()) % static_cast<int64_t>(window)] = norm;
    count() += 1;
  }
  // Where among the sorted norms the percentile lies: between `rank` and the one after it.
  FUSEDOPT_INLINE double position() const {
    return static_cast<double>(size() - 1) * (percentile / 100);
  }
  FUSEDOPT_INLINE int64_t rank() const { return static_cast<int64_t>(position()); }
  FUSEDOPT_INLINE void set_limit(double lower, double upper) const {
    known_limit() = lower + (upper - lower) * (position() - static_cast<double>(rank()));
  }
};

// Norms are unscaled.
struct PerTensor {
  double threshold, beta, warmup, warmup_norm;
  double* state;

  explicit FUSEDOPT_INLINE PerTensor(const AdaptiveClip& clip)
      : threshold(clip.arguments[0]),
        beta(clip.arguments[1]),
        warmup(clip.arguments[2]),
        warmup_norm(clip.arguments[3]),
        state(clip.state) {}
  FUSEDOPT_INLINE double& count(int64_t tensor) const { return state[2 * tensor]; }
  FUSEDOPT_INLINE double& average(int64_t tensor) const { return state[2 * tensor + 1]; }

  FUSEDOPT_INLINE double coef(int64_t tensor, double norm, double global_norm) const {
    if (norm == 0) return 1.0;  // it never warms up, and is not to be the smallest coefficient
    if (count(tensor) < warmup) return clip_coefficient(warmup_norm, global_norm);
    return coefficient_to(threshold * average(tensor), norm);
  }

  FUSEDOPT_INLINE void observe(int64_t tensor, double clipped) const {
    if (clipped == 0) return;
    if (count(tensor) >= warmup) {
      average(tensor) = beta * average(tensor) + (1 - beta) * clipped;
    } else if (count(tensor) == 0 || clipped < average(tensor)) {
      average(tensor) = clipped;
    }
    count(tensor) += 1;
  }
};

struct Unit {
  double clipping, eps;

  explicit FUSEDOPT_INLINE Unit(const AdaptiveClip& clip)
      : clipping(clip.arguments[0]), eps(clip.arguments[1]) {}
  FUSEDOPT_INLINE double coef(double norm, double weights) const {
    return coefficient_to(clipping * (weights > eps ? weights : eps), norm);
  }
};

// Of the global norm.
FUSEDOPT_INLINE double adaptive_limit(const AdaptiveClip& clip, double norm) {
  if (clip.kind == ClipKind::kPercentile) return Percentile(clip).limit();
  return clip.kind == ClipKind::kZScore ? ZScore(clip).limit(norm) : HUGE_VAL;
}

}  // namespace fusedopt
