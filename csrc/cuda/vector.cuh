// Loads and stores of the arrays: 16 bytes at a time if they are aligned.
#pragma once

#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/memory.cuh"
#include "cuda/types.cuh"
#include "math/blocks.h"
#include "math/random.h"

namespace fusedopt::cuda {

inline constexpr int kVectorBytes = 16;

// The number of elements that a thread takes at a time: 16 bytes of the parameter.
template <class param_t>
inline constexpr int vector_size = kVectorBytes / sizeof(param_t);

static_assert(kThreads * kVectorBytes == kRowBytes,
              "a thread holds its own lanes of a chunk's sum");

template <class scalar_t, int kVector>
struct alignas(sizeof(scalar_t) * kVector < kVectorBytes ? sizeof(scalar_t) * kVector
                                                         : kVectorBytes) Vector {
  scalar_t at[kVector];
};

struct MixedPointers;

// The elements of one array that belong to a chunk.
template <class scalar_t>
struct Slice {
  scalar_t* data;

  Slice() = default;
  __device__ Slice(const void* first_of_tensor, int64_t begin)
      : data(const_cast<scalar_t*>(static_cast<const scalar_t*>(first_of_tensor)) + begin) {}
  __device__ Slice(const Array& array, int64_t begin, const TensorShape&, int, MixedPointers&)
      : Slice(array.data, begin) {}

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

  // The array needs no alignment. Elements from `size` on read as zero.
  template <int kVector>
  __device__ Vector<scalar_t, kVector> load_some(int first, int size) const {
    if (first + kVector <= size && aligned<kVector>()) return load<kVector>(first);
    return load_each<kVector, 1>(first, size);
  }

  // Loads the elements first, first + kStride, ... one by one. Those from `size` on read as zero.
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

  // A MixedSlice converts here. The elements of a Slice are converted two at a time, where they are
  // used.
  template <Coding = Coding::kNone, int kCount>
  __device__ void widen(Vector<scalar_t, kCount>&) const {}
  template <int kCount>
  __device__ const Vector<scalar_t, kCount>& widened(const Vector<scalar_t, kCount>& values) const {
    return values;
  }
  template <int kStride, Coding = Coding::kNone, int kCount>
  __device__ void narrow(int, int, const RandomBits&, Vector<scalar_t, kCount>&) const {}
};

// Convert the elements begin, begin + 1, ... of a vector to the type that they are computed in, and
// back. half_t is the format of raw16 elements.
template <class half_t, class scalar_t, int kVector, int kCount>
__device__ void widen(const Vector<scalar_t, kVector>& from, int begin,
                      opmath_t<scalar_t> (&to)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if constexpr (std::is_same_v<scalar_t, raw16>) {
      to[k] = fusedopt::widen(half_t{from.at[begin + k].bits});
    } else {
      to[k] = from.at[begin + k];
    }
  }
}

template <class half_t, class scalar_t, int kVector, int kCount>
__device__ void narrow(const opmath_t<scalar_t> (&from)[kCount], int begin,
                       Vector<scalar_t, kVector>& to) {
  if constexpr (std::is_same_v<scalar_t, raw16>) {
#pragma unroll
    for (int k = 0; k < kCount; k += 2) {
      const uint32_t pair = narrow_pair<half_t>(from[k], from[k + 1]);
      to.at[begin + k].bits = static_cast<uint16_t>(pair);
      to.at[begin + k + 1].bits = static_cast<uint16_t>(pair >> 16);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) to.at[begin + k] = from[k];
  }
}

// A thread's lanes of the norm, one per element of its vector, in the type T.
template <class Norm, int kVector, class T>
struct Lanes {
  T at[kVector] = {};

  Lanes() = default;
  template <class Row>
  __device__ Lanes(float*, const Row&) {}

  template <class grad_t>
  __device__ void add(const Vector<grad_t, kVector>& grads, Format format, int = 0) {
    format.visit<grad_t>([&](auto half) {
      opmath_t<grad_t> values[kVector];
      widen<decltype(half)>(grads, 0, values);
#pragma unroll
      for (int k = 0; k < kVector; ++k)
        at[k] = Norm::combine(at[k], Norm::term(static_cast<T>(values[k])));
    });
  }

  // Combines the lanes in float64.
  __device__ double fold() const {
    double wide[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) wide[k] = at[k];
    return cuda::fold<Norm>(wide);
  }
};

}  // namespace fusedopt::cuda
