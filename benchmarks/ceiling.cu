// Kernels that move a step's bytes and compute next to nothing, to measure how fast a step could
// be.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kMaxArrays = 4;

struct Arrays {
  float4* written[kMaxArrays];  // read too
  const float4* read;
  int64_t vectors;
};

// Each thread has kVectors of every array in flight.
template <int kWritten, int kVectors>
__global__ void in_place(const __grid_constant__ Arrays arrays) {
  const int64_t first = int64_t{blockIdx.x} * blockDim.x * kVectors + threadIdx.x;
  float4 read[kVectors], values[kVectors][kWritten > 0 ? kWritten : 1];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t i = first + int64_t{v} * blockDim.x;
    if (i >= arrays.vectors) continue;
    read[v] = arrays.read[i];
#pragma unroll
    for (int k = 0; k < kWritten; ++k) values[v][k] = arrays.written[k][i];
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t i = first + int64_t{v} * blockDim.x;
    if (i >= arrays.vectors) continue;
#pragma unroll
    for (int k = 0; k < kWritten; ++k) {
      const float4 a = values[v][k], b = read[v];
      arrays.written[k][i] = {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
    }
    // A store that never runs, so that the compiler keeps the load.
    if (kWritten == 0 && read[v].x == 1.2345e38f) arrays.written[0][i] = read[v];
  }
}

template <int kWritten>
cudaError_t launch(const Arrays& arrays, int vectors, int threads, cudaStream_t stream) {
  const auto with = [&](auto kernel) {
    const int64_t per_block = int64_t{threads} * vectors;
    const auto blocks = static_cast<unsigned>((arrays.vectors + per_block - 1) / per_block);
    kernel<<<blocks, threads, 0, stream>>>(arrays);
    return cudaGetLastError();
  };
  if (vectors == 1) return with(in_place<kWritten, 1>);
  if (vectors == 2) return with(in_place<kWritten, 2>);
  if (vectors == 4) return with(in_place<kWritten, 4>);
  return cudaErrorInvalidValue;
}

}  // namespace

// Adds `arrays[count - 1]` to the other arrays. Each has `elements` floats, a multiple of 4. A
// single array is only read. Returns a cudaError_t.
extern "C" int fusedopt_move(float* const* pointers, int count, int64_t elements, int vectors,
                             int threads, void* stream) {
  if (count < 1 || count > kMaxArrays + 1 || elements % 4 != 0) return cudaErrorInvalidValue;
  Arrays arrays{};
  for (int k = 0; k + 1 < count; ++k) {
    arrays.written[k] = reinterpret_cast<float4*>(pointers[k]);
  }
  arrays.read = reinterpret_cast<const float4*>(pointers[count - 1]);
  if (count == 1) arrays.written[0] = reinterpret_cast<float4*>(pointers[0]);
  arrays.vectors = elements / 4;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (count) {
    case 1:
      return launch<0>(arrays, vectors, threads, on);
    case 2:
      return launch<1>(arrays, vectors, threads, on);
    case 3:
      return launch<2>(arrays, vectors, threads, on);
    case 4:
      return launch<3>(arrays, vectors, threads, on);
    default:
      return launch<4>(arrays, vectors, threads, on);
  }
}
