// The memory traffic of a step, or of a norm, and nothing else, to measure how fast it could be.
//
// `arrays` holds the parameter and its states, then the gradient. If the step measures a norm, the
// first pass reads the gradient alone. The next pass reads every array, and writes all but the
// gradient in place. Without written arrays there is no second pass.
#include <algorithm>
#include <cstdint>

namespace {

float read(const float* __restrict data, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += data[i];  // vectorized: built with -fassociative-math
  return sum;
}

template <int kWritten>
void update(float* const* arrays, int64_t first, int64_t count) {
  const float* __restrict grad = arrays[kWritten] + first;
  float* written[kWritten];
  for (int k = 0; k < kWritten; ++k) written[k] = arrays[k] + first;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    for (int k = 0; k < kWritten; ++k) written[k][i] = written[k][i] * 0.5f + grad[i];
  }
}

using Update = void (*)(float* const*, int64_t, int64_t);
constexpr Update kUpdates[] = {nullptr, update<1>, update<2>, update<3>, update<4>, update<5>};

}  // namespace

// Each thread takes its own contiguous part, block by block. The second pass goes backwards, as the
// data that was read last is still in the cache.
extern "C" float stream(float* const* arrays, int written, int64_t count, bool measure, int threads,
                        int64_t block) {
  float sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
    const int64_t blocks = (count + block - 1) / block;
    const auto size = [&](int64_t b) { return std::min(block, count - b * block); };
    if (measure) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < blocks; ++b) sum += read(arrays[written] + b * block, size(b));
    }
#pragma omp for schedule(static)
    for (int64_t back = 0; back < (written > 0 ? blocks : 0); ++back) {
      const int64_t b = blocks - 1 - back;
      kUpdates[written](arrays, b * block, size(b));
    }
  }
  return sum;
}
