#include "cuda/upload.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda/launch.cuh"

namespace fusedopt::cuda {

namespace {

// A part of a table, on its way to the device's memory.
struct Piece {
  uint64_t* to;
  size_t words;
  uint64_t from[kLarge / sizeof(uint64_t)];
};

// Through arguments, as a copy from pageable memory would wait for the stream.
__global__ void __launch_bounds__(kThreads) upload_kernel(const __grid_constant__ Piece piece) {
  copy_words(piece.from, piece.to, piece.words);
}

// `fill(offset, size, to)` copies that part of the table.
template <class Fill>
cudaError_t upload_pieces(void* to, size_t size, cudaStream_t stream, Fill fill) {
  for (size_t offset = 0; offset < size; offset += kLarge) {
    Piece piece;
    const size_t part = std::min(kLarge, size - offset);
    piece.to = reinterpret_cast<uint64_t*>(static_cast<unsigned char*>(to) + offset);
    piece.words = part / sizeof(uint64_t);
    fill(offset, part, reinterpret_cast<unsigned char*>(piece.from));
    const unsigned blocks = static_cast<unsigned>((piece.words + kThreads - 1) / kThreads);
    FUSEDOPT_RETURN_IF_ERROR(launch_kernel(upload_kernel, blocks, stream, piece));
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t upload_step_args(const StepParams& step, const Launch& launch) {
  return upload_pieces(launch.step_args, total_bytes(step), launch.stream,
                       [&](size_t offset, size_t size, unsigned char* to) {
                         copy_step_args(step, offset, size, to);
                       });
}

size_t step_args_bytes(const StepParams& step) {
  const size_t size = total_bytes(step);
  return size <= kSmall ? 0 : size;
}

cudaError_t upload(int device, cudaStream_t stream, void* to, const void* from, size_t size) {
  const DeviceScope scope(device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  return upload_pieces(to, size, stream, [&](size_t offset, size_t part, unsigned char* piece) {
    memcpy(piece, static_cast<const unsigned char*>(from) + offset, part);
  });
}

}  // namespace fusedopt::cuda
