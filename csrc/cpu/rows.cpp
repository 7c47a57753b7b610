#include "cpu/rows.h"

#include "cpu/blocks.h"
#include "cpu/fetch.h"
#include "math/split.h"

namespace fusedopt::cpu {

namespace {

template <class scalar_t>
struct Widen {
  static FUSEDOPT_INLINE void run(const scalar_t* from, int64_t count, float* to) {
    for_each_and_fetch(count, to_next_row(count), [&](int64_t i) { to[i] = widen(from[i]); }, from);
  }
};

template <class scalar_t>
struct Narrow {
  static FUSEDOPT_INLINE void run(const float* from, int64_t count, scalar_t* to) {
    for_each_and_fetch(
        count, to_next_row(count), [&](int64_t i) { to[i] = narrow<scalar_t>(from[i]); }, to);
  }
};

template <class scalar_t>
struct NarrowAtRandom {
  static FUSEDOPT_INLINE void run(const float* from, int64_t first, int64_t count, scalar_t* to,
                                  const RandomBits random, int shift) {
    const int32_t begin = static_cast<int32_t>(first);
    const auto narrow_one = [&](int64_t i) {
      const uint32_t bits = random.of(begin + static_cast<int32_t>(i)) >> shift & 0xffffu;
      to[i].bits = static_cast<uint16_t>(narrow_at_random<scalar_t>(from[i], bits));
    };
    for_each_and_fetch(count, to_next_row(count), narrow_one, to);
  }
};

template <class scalar_t, class rest_t>
struct Join {
  static FUSEDOPT_INLINE void run(const scalar_t* from, const rest_t* rest, int64_t count,
                                  float* to) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) to[i] = join<scalar_t, rest_t>(from[i].bits, rest[i]);
  }
};

template <class scalar_t, class rest_t>
struct Split {
  static FUSEDOPT_INLINE void run(const float* from, int64_t count, scalar_t* to, rest_t* rest) {
    const auto split_one = [&](int64_t i) {
      const Parts parts = split<scalar_t, rest_t>(from[i]);
      to[i].bits = static_cast<uint16_t>(parts.number);
      rest[i] = static_cast<rest_t>(parts.rest);
    };
    for_each_and_fetch(count, to_next_row(count), split_one, to, rest);
  }
};

template <class scalar_t>
scalar_t* elements(const Array& array, int64_t first) {
  return static_cast<scalar_t*>(array.data) + first;
}

// Calls body(rest) with the rests of a master from element `first` on. Returns false if the array
// is no master.
template <class Body>
bool visit_rest(const Array& array, int64_t first, Body body) {
  switch (rest_bytes(array.storage)) {
    case 2:
      body(static_cast<int16_t*>(array.second) + first);
      return true;
    case 1:
      body(static_cast<int8_t*>(array.second) + first);
      return true;
    default:
      return false;
  }
}

}  // namespace

void load_row(Isa isa, const Array& array, int64_t first, int64_t count, float* to) {
  if (is_in_blocks(array.storage)) return load_blocks(isa, array, first, count, to);
  visit_storage(array.storage, [&](auto stored) {
    using scalar_t = type_of<decltype(stored)>;
    if constexpr (sizeof(scalar_t) == 2) {
      const scalar_t* const from = elements<scalar_t>(array, first);
      const bool is_master = visit_rest(array, first, [&](auto* rest) {
        using rest_t = std::remove_pointer_t<decltype(rest)>;
        run_best<Join<scalar_t, rest_t>>(isa, from, rest, count, to);
      });
      if (!is_master) run_best<Widen<scalar_t>>(isa, from, count, to);
    }
  });
}

void store_row(Isa isa, const float* from, int64_t first, int64_t count, const Array& array,
               const RandomBits& random) {
  if (is_in_blocks(array.storage)) return store_blocks(isa, from, first, count, array, random);
  visit_storage(array.storage, [&](auto stored) {
    using scalar_t = type_of<decltype(stored)>;
    if constexpr (sizeof(scalar_t) == 2) {
      scalar_t* const to = elements<scalar_t>(array, first);
      const bool is_master = visit_rest(array, first, [&](auto* rest) {
        using rest_t = std::remove_pointer_t<decltype(rest)>;
        run_best<Split<scalar_t, rest_t>>(isa, from, count, to, rest);
      });
      if (is_master) return;
      if (is_stochastic(array.storage)) {
        return run_best<NarrowAtRandom<scalar_t>>(isa, from, first, count, to, random,
                                                  array.random_shift);
      }
      run_best<Narrow<scalar_t>>(isa, from, count, to);
    }
  });
}

}  // namespace fusedopt::cpu
