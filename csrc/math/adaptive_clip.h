// Limits of the gradient norm that follow the norms of the steps before. fusedopt/clip.py says
// where each comes from.
#pragma once

#include <cmath>
#include <cstdint>

#include "inline.h"

namespace fusedopt {

enum class ClipKind : int { kFixed, kPercentile, kZScore };

inline constexpr int kMaxClipArguments = 4;

// What a step is to do, and what it knows of earlier ones. The state lies on the first device; the
// others get a copy of it for a step.
struct AdaptiveClip {
  ClipKind kind;
  double arguments[kMaxClipArguments];
  double* state;  // count, mean or limit, variance; then the norms that a percentile is taken of
};

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

FUSEDOPT_INLINE double adaptive_limit(const AdaptiveClip& clip, double norm) {
  return clip.kind == ClipKind::kZScore ? ZScore(clip).limit(norm) : Percentile(clip).limit();
}

}  // namespace fusedopt
