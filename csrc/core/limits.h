// Limits of the gradient norm that adapt themselves. Percentile and ZScore limit the global norm by
// the norms of earlier steps, PerTensor limits each tensor's norm by its own earlier norms, and
// Unit limits each row's norm by the norm of the row's weights. fusedopt/reference/limits.py names
// the papers.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/inline.h"

namespace fusedopt {

enum class LimitKind : int { kFixed, kPercentile, kZScore, kPerTensor, kUnit };

// A kind of limit as a front end sees it.
struct LimitInfo {
  const char* name;
  int num_arguments;  // in the order of the fields of its Python class
};

// The kinds, in the order of LimitKind.
inline constexpr LimitInfo kLimits[] = {
    {"Fixed", 0}, {"Percentile", 3}, {"ZScore", 4}, {"PerTensor", 4}, {"Unit", 2}};

constexpr int most_limit_arguments() {
  int most = 0;
  for (const LimitInfo& limit : kLimits) {
    if (limit.num_arguments > most) most = limit.num_arguments;
  }
  return most;
}
inline constexpr int kMaxLimitArguments = most_limit_arguments();

// The state lies on the first device; every other device gets a copy of it for a step.
struct Limit {
  LimitKind kind;
  double arguments[kMaxLimitArguments];
  // kZScore: the count, the mean, the variance. kPercentile: the count, the limit, an unused
  // number, then the last norms. kPerTensor: for every tensor, the count and the average.
  double* state;
};

// The factor that brings a norm down to the limit. It is 1 for a norm of nan: the global limit
// handles nan.
FUSEDOPT_INLINE double coefficient_to(double limit, double norm) {
  return norm > limit ? limit / norm : 1.0;
}

// The coefficient of torch.nn.utils.clip_grad_norm_. It is nan if the norm is nan.
FUSEDOPT_INLINE double clip_coefficient(double limit, double norm) {
  if (limit == HUGE_VAL) return 1.0;
  const double coef = limit / (norm + 1e-6);
  return coef > 1.0 ? 1.0 : coef;
}

// The smaller of a segment's own coefficient and the coefficient that all gradients share.
FUSEDOPT_INLINE double smaller(double own, double shared) { return own < shared ? own : shared; }

struct ZScore {
  double alpha, threshold, warmup, eps;
  double* state;

  explicit FUSEDOPT_INLINE ZScore(const Limit& limit)
      : alpha(limit.arguments[0]),
        threshold(limit.arguments[1]),
        warmup(limit.arguments[2]),
        eps(limit.arguments[3]),
        state(limit.state) {}
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

  explicit FUSEDOPT_INLINE Percentile(const Limit& limit)
      : percentile(limit.arguments[0]),
        window(limit.arguments[1]),
        warmup(limit.arguments[2]),
        state(limit.state) {}
  FUSEDOPT_INLINE double& count() const { return state[0]; }
  FUSEDOPT_INLINE double& known_limit() const { return state[1]; }
  FUSEDOPT_INLINE double* norms() const { return state + 3; }
  FUSEDOPT_INLINE int64_t size() const {  // how many norms there are
    return static_cast<int64_t>(count() < window ? count() : window);
  }

  FUSEDOPT_INLINE double limit() const { return count() < warmup ? HUGE_VAL : known_limit(); }

  FUSEDOPT_INLINE void observe(double norm) const {
    norms()[static_cast<int64_t>(count()) % static_cast<int64_t>(window)] = norm;
    count() += 1;
  }
  // The percentile's place among the sorted norms. It lies between `rank` and `rank + 1`.
  FUSEDOPT_INLINE double position() const {
    return static_cast<double>(size() - 1) * (percentile / 100);
  }
  FUSEDOPT_INLINE int64_t rank() const { return static_cast<int64_t>(position()); }
  FUSEDOPT_INLINE void set_limit(double lower, double upper) const {
    known_limit() = lower + (upper - lower) * (position() - static_cast<double>(rank()));
  }
};

// All norms are those of unscaled gradients.
struct PerTensor {
  double threshold, beta, warmup, warmup_norm;
  double* state;

  explicit FUSEDOPT_INLINE PerTensor(const Limit& limit)
      : threshold(limit.arguments[0]),
        beta(limit.arguments[1]),
        warmup(limit.arguments[2]),
        warmup_norm(limit.arguments[3]),
        state(limit.state) {}
  FUSEDOPT_INLINE double& count(int64_t tensor) const { return state[2 * tensor]; }
  FUSEDOPT_INLINE double& average(int64_t tensor) const { return state[2 * tensor + 1]; }

  FUSEDOPT_INLINE double coef(int64_t tensor, double norm, double global_norm) const {
    // A tensor whose gradients are all zero never warms up. Its coefficient must not count as the
    // smallest one.
    if (norm == 0) return 1.0;
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

  explicit FUSEDOPT_INLINE Unit(const Limit& limit)
      : clipping(limit.arguments[0]), eps(limit.arguments[1]) {}
  FUSEDOPT_INLINE double coef(double norm, double weights) const {
    return coefficient_to(clipping * (weights > eps ? weights : eps), norm);
  }
};

// The adaptive limit of the global norm. Infinity means no limit.
FUSEDOPT_INLINE double adaptive_limit(const Limit& limit, double norm) {
  switch (limit.kind) {
    case LimitKind::kPercentile:
      return Percentile(limit).limit();
    case LimitKind::kZScore:
      return ZScore(limit).limit(norm);
    case LimitKind::kFixed:
    case LimitKind::kPerTensor:
    case LimitKind::kUnit:
      break;
  }
  return HUGE_VAL;
}

}  // namespace fusedopt
