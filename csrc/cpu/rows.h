// Rows of a chunk's arrays, converted to the type that they are computed in.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/storage.h"
#include "cpu/isa.h"
#include "math/blocks.h"
#include "math/random.h"

namespace fusedopt::cpu {

// The number of elements in a row. A row stays in the L1 cache while a rule works on it. Rows are
// short, so that the processor fetches the next row while it computes this one.
template <class T>
inline constexpr int64_t kRow = 1024 / sizeof(T);

// How far ahead the next row is. The last row, which may be shorter, has no next one.
inline int64_t to_next_row(int64_t count) { return count == kRow<float> ? count : 0; }

// Convert the elements first, first + 1, ... of an array that is not stored as float32 or float64.
void load_row(Isa isa, const Array& array, int64_t first, int64_t count, float* to);
void store_row(Isa isa, const float* from, int64_t first, int64_t count, const Array& array,
               const RandomBits& random);

// A gradient is only read.
inline Array grads_of(const void* data, Storage storage) {
  return {const_cast<void*>(data), nullptr, storage, 0};
}

// One array of a chunk. If its elements are stored as T, load() returns a pointer into the array.
// Otherwise load() returns a converted copy, and store() writes it back.
template <class T>
class Rows {
 public:
  // Selects an array of a tensor, and the chunk that begins at `first_element` and has these random
  // bits.
  void begin(const Array& array, int64_t first_element, const RandomBits& random = {}) {
    array_ = array;
    in_place_ = array.storage == kStorage;
    array_.data = static_cast<char*>(array.data) + first_element * bytes_of(array.storage);
    const int64_t second = is_in_blocks(array.storage)
                               ? blocks_of(first_element) * static_cast<int64_t>(sizeof(float))
                               : first_element * rest_bytes(array.storage);
    array_.second = static_cast<char*>(array.second) + second;
    random_ = random;
  }

  bool in_place() const { return in_place_; }

  T* load(Isa isa, int64_t first, int64_t count) {
    if (in_place_) return static_cast<T*>(array_.data) + first;
    if constexpr (kConverts) load_row(isa, array_, first, count, row_);
    return row_;
  }

  void store(Isa isa, int64_t first, int64_t count) {
    if constexpr (kConverts) {
      if (!in_place_) store_row(isa, row_, first, count, array_, random_);
    }
  }

 private:
  static constexpr bool kConverts = sizeof(T) == sizeof(float);
  static constexpr Storage kStorage = kConverts ? Storage::kFloat32 : Storage::kFloat64;

  Array array_{};
  RandomBits random_;
  bool in_place_ = true;
  alignas(64) T row_[kRow<T>];
};

}  // namespace fusedopt::cpu
