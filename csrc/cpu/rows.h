// Rows of a chunk's arrays, converted to the type that they are computed in.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/storage.h"
#include "cpu/isa.h"

namespace fusedopt::cpu {

// The number of elements in a row. A row stays in the L1 cache while a rule works on it.
template <class T>
inline constexpr int64_t kRow = 4096 / sizeof(T);

// Convert `count` elements from a 16-bit storage to float32, and back.
void widen_row(Isa isa, const void* from, Storage storage, int64_t count, float* to);
void narrow_row(Isa isa, const float* from, int64_t count, void* to, Storage storage);

// One array of a chunk. If its elements are stored as T, load() returns a pointer into the array.
// Otherwise load() returns a converted copy, and store() writes it back.
template <class T>
class Rows {
 public:
  // Selects the array `data` of a tensor, and the chunk that begins at `first_element`.
  void begin(const void* data, Storage storage, int64_t first_element) {
    storage_ = storage;
    in_place_ = storage == kStorage;
    const int64_t size = in_place_ ? sizeof(T) : bytes_of(storage);
    data_ = static_cast<char*>(const_cast<void*>(data)) + first_element * size;
  }

  bool in_place() const { return in_place_; }

  T* load(Isa isa, int64_t first, int64_t count) {
    if (in_place_) return reinterpret_cast<T*>(data_) + first;
    if constexpr (kConverts) {
      widen_row(isa, data_ + first * bytes_of(storage_), storage_, count, row_);
    }
    return row_;
  }

  void store(Isa isa, int64_t first, int64_t count) {
    if constexpr (kConverts) {
      if (!in_place_) narrow_row(isa, row_, count, data_ + first * bytes_of(storage_), storage_);
    }
  }

 private:
  static constexpr bool kConverts = sizeof(T) == sizeof(float);
  static constexpr Storage kStorage = kConverts ? Storage::kFloat32 : Storage::kFloat64;

  char* data_ = nullptr;
  Storage storage_ = Storage::kFloat32;
  bool in_place_ = true;
  alignas(64) T row_[kRow<T>];
};

}  // namespace fusedopt::cpu
