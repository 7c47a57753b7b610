// Accesses of 16 bytes.
#pragma once

#include <cstdint>

#include "../math/convert.h"
#include "block.cuh"

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
template <class scalar_t, int kVector>
struct Stretch {
  using Values = Vector<scalar_t, kVector>;
  scalar_t* data;

  __device__ Stretch(const void* first_of_tensor, int64_t begin)
      : data(const_cast<scalar_t*>(static_cast<const scalar_t*>(first_of_tensor)) + begin) {}

  __device__ bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % alignof(Values) == 0;
  }
  __device__ Values load(int first) const { return *reinterpret_cast<const Values*>(data + first); }
  __device__ void store(int first, const Values& values) const {
    *reinterpret_cast<Values*>(data + first) = values;
  }
  // Needs no alignment; elements from `size` on read as zero.
  __device__ Values load_some(int first, int size) const {
    Values values{};
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if (first + k < size) values.at[k] = data[first + k];
    }
    return values;
  }
};

// A thread's lanes of the norm: one per element of its vector.
template <class Norm, int kVector>
struct Lanes {
  double at[kVector] = {};

  template <class grad_t>
  __device__ void add(const Vector<grad_t, kVector>& grad) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      at[k] = Norm::combine(at[k], Norm::term(widen(grad.at[k])));
    }
  }
};

}  // namespace fusedopt::cuda
