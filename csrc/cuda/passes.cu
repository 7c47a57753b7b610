#include "passes.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../rules.h"
#include "arguments.cuh"
#include "grad_norm.cuh"
#include "update.cuh"

namespace fusedopt::cuda {

namespace {

#define FUSEDOPT_RETURN_IF_ERROR(call) \
  if (const cudaError_t error = (call); error != cudaSuccess) return error

// Makes a device current, and the one before it again at the end.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) error = cudaSetDevice(device);
    changed_ = error == cudaSuccess && before_ != device;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// As many blocks as the device holds at once, each of which walks over many chunks. Asked once: the
// answer takes the runtime longer than a launch.
template <auto kernel>
cudaError_t grid_size(int device, int* blocks) {
  constexpr int kRemembered = 64;  // devices
  static std::atomic<int> known[kRemembered];
  if (device < kRemembered && (*blocks = known[device]) > 0) return cudaSuccess;
  int multiprocessors = 0, per_multiprocessor = 0;
  FUSEDOPT_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  FUSEDOPT_RETURN_IF_ERROR(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0));
  *blocks = std::max(1, multiprocessors * per_multiprocessor);
  if (device < kRemembered) known[device] = *blocks;
  return cudaSuccess;
}

template <class Argument>
cudaError_t launch_kernel(void (*kernel)(Argument), unsigned blocks, cudaStream_t stream,
                          const Argument& argument) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, argument);
}

// A launch of one block per chunk, as far as they fit the device.
template <auto kernel, size_t kBytes>
cudaError_t launch_pass(const Launch& launch, const Arguments<kBytes>& arguments) {
  int blocks = 0;
  FUSEDOPT_RETURN_IF_ERROR(grid_size<kernel>(launch.device, &blocks));
  const int64_t wanted = std::clamp<int64_t>(arguments.pass.num_chunks, 1, blocks);
  return launch_kernel(kernel, static_cast<unsigned>(wanted), launch.stream, arguments);
}

template <size_t kBytes>
Arguments<kBytes> make_arguments(const Pass& pass, unsigned* ticket, void* moving, void* keep) {
  Arguments<kBytes> arguments;
  arguments.pass = pass;
  arguments.ticket = ticket;
  arguments.moving = moving;
  arguments.keep = static_cast<unsigned char*>(keep);
  if (moving == nullptr) copy_moving(pass, 0, total_bytes(pass), arguments.inlined);
  return arguments;
}

cudaError_t upload(const Pass& pass, const Launch& launch) {
  const size_t size = total_bytes(pass);
  for (size_t offset = 0; offset < size; offset += kLarge) {
    Piece piece;
    piece.to = static_cast<unsigned char*>(launch.moving) + offset;
    piece.size = std::min(kLarge, size - offset);
    copy_moving(pass, offset, piece.size, piece.bytes);
    FUSEDOPT_RETURN_IF_ERROR(launch_kernel(upload_kernel, 1, launch.stream, piece));
  }
  return cudaSuccess;
}

cudaError_t measure(const Pass& pass, const Launch& launch) {
  unsigned* ticket = launch.tickets;
  const size_t size = total_bytes(pass);
  if (size > kSmall && size <= kLarge) {
    return launch_pass<grad_norm_kernel<kLarge>>(
        launch, make_arguments<kLarge>(pass, ticket, nullptr, launch.moving));
  }
  if (size > kLarge) FUSEDOPT_RETURN_IF_ERROR(upload(pass, launch));
  return launch_pass<grad_norm_kernel<kSmall>>(
      launch, make_arguments<kSmall>(pass, ticket, launch.moving, nullptr));
}

template <class Rule>
cudaError_t update(const Pass& pass, const Launch& launch) {
  const bool measured = pass.options.measure;  // then what moves has been left on the device
  if (launch.moving != nullptr && !measured) FUSEDOPT_RETURN_IF_ERROR(upload(pass, launch));
  return launch_pass<update_kernel<Rule>>(
      launch, make_arguments<kSmall>(pass, launch.tickets + 1, launch.moving, nullptr));
}

}  // namespace

size_t moving_bytes(const Pass& pass) {
  const size_t size = total_bytes(pass);
  return size <= kSmall ? 0 : size;
}

template <class Rule>
cudaError_t run(const Pass& pass, const Launch& launch, Phases phases) {
  const DeviceScope scope(launch.device);
  FUSEDOPT_RETURN_IF_ERROR(scope.error);
  if (phases != Phases::kUpdate && pass.options.measure) {
    FUSEDOPT_RETURN_IF_ERROR(measure(pass, launch));
  }
  return phases == Phases::kMeasure ? cudaSuccess : update<Rule>(pass, launch);
}

#define FUSEDOPT_INSTANTIATE(Rule) \
  template cudaError_t run<Rule>(const Pass&, const Launch&, Phases);
FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_INSTANTIATE)

}  // namespace fusedopt::cuda
