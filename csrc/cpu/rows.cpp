#include "cpu/rows.h"

namespace fusedopt::cpu {

namespace {

template <class scalar_t>
struct Widen {
  static FUSEDOPT_INLINE void run(const scalar_t* from, int64_t count, float* to) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
  }
};

template <class scalar_t>
struct Narrow {
  static FUSEDOPT_INLINE void run(const float* from, int64_t count, scalar_t* to) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; ++i) to[i] = narrow<scalar_t>(from[i]);
  }
};

}  // namespace

void widen_row(Isa isa, const void* from, Storage storage, int64_t count, float* to) {
  if (storage == Storage::kBFloat16) {
    return run_best<Widen<bfloat16>>(isa, static_cast<const bfloat16*>(from), count, to);
  }
  run_best<Widen<float16>>(isa, static_cast<const float16*>(from), count, to);
}

void narrow_row(Isa isa, const float* from, int64_t count, void* to, Storage storage) {
  if (storage == Storage::kBFloat16) {
    return run_best<Narrow<bfloat16>>(isa, from, count, static_cast<bfloat16*>(to));
  }
  run_best<Narrow<float16>>(isa, from, count, static_cast<float16*>(to));
}

}  // namespace fusedopt::cpu
