#include "cuda/upload.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda/launch.cuh"

namespace fusedopt::cuda {

namespace {

// The piece of a table that the arguments of one launch carry.
struct Carried {
  uint64_t* to;
  int64_t words;
  uint64_t from[kLargeArgs / sizeof(uint64_t)];
};

// Copies from its arguments: cudaMemcpyAsync from pageable memory would wait for the stream.
__global__ void __launch_bounds__(kThreads) upload_kernel(const __grid_constant__ Carried carried) {
  copy_words(carried.from, carried.to, carried.words);
}

// fill(offset, size, to) copies the bytes [offset, offset + size) of the table.
template <class Fill>
cudaError_t upload_table(void* to, int64_t bytes, cudaStream_t stream, Fill fill) {
  constexpr int64_t kWord = sizeof(uint64_t);
  for (int64_t offset = 0; offset < bytes; offset += kLargeArgs) {
    Carried carried;
    const int64_t size = std::min(kLargeArgs, bytes - offset);
    carried.to = reinterpret_cast<uint64_t*>(static_cast<unsigned char*>(to) + offset);
    carried.words = size / kWord;
    fill(offset, size, carried.from);
    const unsigned blocks = static_cast<unsigned>((carried.words + kThreads - 1) / kThreads);
    FUSEDOPT_RETURN_IF_ERROR(launch_kernel(upload_kernel, blocks, stream, carried));
  }
  return cudaSuccess;
}

}  // namespace

void copy_step_args(const StepParams& step, int64_t offset, int64_t size, void* to) {
  const StepArgs args(step);
  const struct {
    const void* data;
    int64_t begin, end;
  } tables[] = {{step.grads, 0, args.groups_at()}, {step.groups, args.groups_at(), args.bytes()}};
  for (const auto& table : tables) {
    const int64_t first = std::max(offset, table.begin);
    const int64_t last = std::min(offset + size, table.end);
    if (first >= last) continue;
    memcpy(static_cast<unsigned char*>(to) + (first - offset),
           static_cast<const unsigned char*>(table.data) + (first - table.begin), last - first);
  }
}

cudaError_t upload_step_args(const StepParams& step, const Launch& launch) {
  return upload_table(
      step.step_args, StepArgs(step).bytes(), launch.stream,
      [&](int64_t offset, int64_t size, void* to) { copy_step_args(step, offset, size, to); });
}

cudaError_t upload(Launch launch, void* to, const void* from, size_t bytes) {
  const DeviceScope scope(launch.device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  return upload_table(to, static_cast<int64_t>(bytes), launch.stream,
                      [&](int64_t offset, int64_t size, void* part) {
                        memcpy(part, static_cast<const unsigned char*>(from) + offset, size);
                      });
}

}  // namespace fusedopt::cuda
