// Loads and stores of the arrays, 16 bytes at a time where they are aligned.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "memory.cuh"
#include "types.cuh"

namespace fusedopt::cuda {

inline constexpr int kVectorBytes = 16;

// How many elements a thread takes at a time: 16 bytes of the parameter.
template <class param_t>
inline constexpr int vector_size = kVectorBytes / sizeof(param_t);

static_assert(kThreads * kVectorBytes == kRowBytes,
              "a thread holds its own lanes of a chunk's sum");

template <class scalar_t, int kVector>
struct alignas(sizeof(scalar_t) * kVector < kVectorBytes ? sizeof(scalar_t) * kVector
                                                         : kVectorBytes) Vector {
  scalar_t at[kVector];
};

// One array's stretch of a chunk.
template <class scalar_t>
struct Stretch {
  scalar_t* data;

  Stretch() = default;
  __device__ Stretch(const void* first_of_tensor, int64_t begin)
      : data(const_cast<scalar_t*>(static_cast<const scalar_t*>(first_of_tensor)) + begin) {}

  template <int kVector>
  __device__ bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % alignof(Vector<scalar_t, kVector>) == 0;
  }
  template <int kVector>
  __device__ Vector<scalar_t, kVector> load(int first) const {
    return load_global(reinterpret_cast<const Vector<scalar_t, kVector>*>(data + first));
  }
  template <int kVector>
  __device__ void store(int first, const Vector<scalar_t, kVector>& values) const {
    store_global(reinterpret_cast<Vector<scalar_t, kVector>*>(data + first), values);
  }

  // Needs no alignment; elements from `size` on read as zero.
  template <int kVector>
  __device__ Vector<scalar_t, kVector> load_some(int first, int size) const {
    if (first + kVector <= size && aligned<kVector>()) return load<kVector>(first);
    return load_each<kVector, 1>(first, size);
  }

  // Elements first, first + kStride, ... one by one, as far as they are there.
  template <int kCount, int kStride>
  __device__ Vector<scalar_t, kCount> load_each(int first, int size) const {
    Vector<scalar_t, kCount> values{};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int i = first + k * kStride;
      if (i < size) values.at[k] = load_global(data + i);
    }
    return values;
  }
  template <int kCount, int kStride>
  __device__ void store_each(int first, int size, const Vector<scalar_t, kCount>& values) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int i = first + k * kStride;
      if (i < size) store_global(data + i, values.at[k]);
    }
  }
};

// A thread's lanes of the norm: one per element of its vector.
template <class Norm, int kVector>
struct Lanes {
  double at[kVector] = {};

  template <class grad_t>
  __device__ void add(const Vector<grad_t, kVector>& grad, Converter convert) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) at[k] = Norm::add(at[k], convert.widen(grad.at[k]));
  }
};

}  // namespace fusedopt::cuda
