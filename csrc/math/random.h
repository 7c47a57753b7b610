// The random bits of stochastic rounding: a function of the seed, the step, the tensor, and the
// element's index. There is no state.
#pragma once

#include <cstdint>

#include "math/inline.h"

namespace fusedopt {

// Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators".
FUSEDOPT_INLINE uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Wellons, 2018, "Prospecting for hash functions".
FUSEDOPT_INLINE uint32_t lowbias32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The elements with the same index >> kKeyBits share a key.
inline constexpr int kKeyBits = 14;
inline constexpr int64_t kKeySize = int64_t{1} << kKeyBits;

FUSEDOPT_INLINE uint32_t random_key(uint64_t seed, uint64_t step, uint64_t tensor,
                                    uint64_t index_of_key) {
  const uint64_t of_tensor = splitmix64(splitmix64(splitmix64(seed) ^ step) ^ tensor);
  return static_cast<uint32_t>(splitmix64(of_tensor ^ index_of_key));
}

// The random bits of kKeySize neighboring elements or fewer. `element` is an index among them.
struct RandomBits {
  uint32_t first = 0;  // the index of element 0 in the whole tensor, modulo 2^32
  int32_t change = 0;  // elements from here on have the next key
  uint32_t key = 0, next_key = 0;

  RandomBits() = default;
  FUSEDOPT_INLINE RandomBits(uint64_t seed, uint64_t step, uint64_t tensor, int64_t first_element)
      : first(static_cast<uint32_t>(first_element)),
        change(static_cast<int32_t>(kKeySize - first_element % kKeySize)),
        key(random_key(seed, step, tensor, first_element >> kKeyBits)),
        next_key(random_key(seed, step, tensor, (first_element >> kKeyBits) + 1)) {}

  FUSEDOPT_INLINE uint32_t of(int32_t element) const {
    const uint32_t shared = element < change ? key : next_key;
    return lowbias32((first + static_cast<uint32_t>(element)) * 0x9e3779b1u + shared);
  }
};

}  // namespace fusedopt
