// CUDA on the CPU, as far as this project uses it: with this directory on the include path, a C++
// compiler takes the .cu files as they are, and their kernels run as grid.h describes.
//
// It differs from a GPU in this:
//  - A __shared__ variable is static: it starts as zero and keeps its value from block to block,
//    where a GPU's is undefined. There is no dynamic shared memory.
//  - Everything is done when a call returns: streams have no effect.
//  - A thread that waits in vain (the others wait elsewhere or have exited), that its own mask
//    leaves out, that shuffles from a lane that is not there, or whose address is not aligned,
//    makes the launch throw std::runtime_error. So does whatever else a kernel throws. The next
//    launch is not affected.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>  // nvcc has it always.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "grid.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__  // Empty, as the standard library writes __attribute__((__noinline__)).
#define __launch_bounds__(...)
#define __grid_constant__

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNotSupported = 801,
};

namespace emulator {

inline std::atomic<int> multiprocessors = races::kWatched ? 1 : 3;  // Two blocks can race.
inline thread_local cudaError_t last_error = cudaSuccess;

// Another seed has blocks and threads run in another order, from the next launch on.
inline void set_block_order(unsigned seed) { grid.seed(seed); }
inline void set_multiprocessor_count(int count) { multiprocessors = count; }
inline unsigned long long launches() { return grid.launches(); }
inline void reset_counters() { grid.forget_launches(); }

inline cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

template <class T>
struct alignas(2 * sizeof(T)) Vector2 {
  T x, y;
};
template <class T>
struct alignas(4 * sizeof(T)) Vector4 {
  T x, y, z, w;
};

// Zeros fill up a wider type.
template <class To, class From>
To bits(From from) {
  To to{};
  std::memcpy(&to, &from, std::min(sizeof to, sizeof from));
  return to;
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned lane) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof value <= sizeof(std::uint64_t));
  return bits<T>(grid.meet(name, mask, bits<std::uint64_t>(value), lane).value);
}

// A lane that would ask beyond the end of its segment of the warp asks itself.
inline unsigned within(int width, unsigned lane) {
  return lane <= (grid.lane() | (width - 1u)) ? lane : grid.lane();
}

// What csrc/cuda/memory.cuh loads and stores with here. A GPU faults on such an address too.
template <class T>
void check_alignment(const T* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(T) == 0) return;
  throw std::runtime_error("an access of " + std::to_string(sizeof(T)) +
                           " bytes at an address that is not a multiple of " +
                           std::to_string(alignof(T)));
}
template <class T>
T load_global(const T* from) {
  check_alignment(from);
  grid.count_load(sizeof(T));
  return *from;
}
template <class T>
void store_global(T* to, const T& value) {
  check_alignment(to);
  grid.count_store(sizeof(T));
  *to = value;
}

// next(what was there) comes there; returns what was.
template <class T, class Next>
T atomically(T* address, Next next) {
  const races::Unseen unseen;
  grid.meet_an_atomic();
  return std::exchange(*address, next(*address));
}

template <class T, class... Types>
using OneOf = std::enable_if_t<(std::is_same_v<T, Types> || ...), T>;
template <class T>
using Same = std::common_type_t<T>;  // Not deduced: a value converts to what its address holds.

}  // namespace emulator

// ---------------------------------------------------------------- Types and built-in variables

using uint3 = emulator::Index;
using uint2 = emulator::Vector2<unsigned>;
using uint4 = emulator::Vector4<unsigned>;
using int4 = emulator::Vector4<int>;
using float2 = emulator::Vector2<float>;
using float4 = emulator::Vector4<float>;
using double2 = emulator::Vector2<double>;

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;

  constexpr dim3(unsigned its_x = 1, unsigned its_y = 1, unsigned its_z = 1)
      : x(its_x), y(its_y), z(its_z) {}
  constexpr dim3(uint3 index) : x(index.x), y(index.y), z(index.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

inline const uint3& threadIdx = emulator::grid.thread;
inline const uint3& blockIdx = emulator::grid.block;
inline const uint3& blockDim = emulator::grid.block_size;
inline const uint3& gridDim = emulator::grid.grid_size;
inline constexpr int warpSize = emulator::kWarpSize;

// --------------------------------------------------------- Barriers, votes, shuffles and fences

inline void __syncthreads() { emulator::grid.meet("__syncthreads", emulator::kWholeBlock); }
inline int __syncthreads_or(int predicate) {
  return emulator::grid.meet("__syncthreads_or", emulator::kWholeBlock, predicate != 0).votes != 0;
}
inline void __syncwarp(unsigned mask = 0xffffffff) { emulator::grid.meet("__syncwarp", mask); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::grid.meet("__ballot_sync", mask, predicate != 0).votes;
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulator::grid.meet("__any_sync", mask, predicate != 0).votes != 0;
}
inline int __ffs(int value) { return __builtin_ffs(value); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  const unsigned in_segment = width - 1;
  const unsigned asked = (emulator::grid.lane() & ~in_segment) | (lane & in_segment);
  return emulator::shuffle("__shfl_sync", mask, value, asked);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  const unsigned asked = emulator::within(width, emulator::grid.lane() ^ (lane_mask % warpSize));
  return emulator::shuffle("__shfl_xor_sync", mask, value, asked);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const unsigned asked = emulator::within(width, emulator::grid.lane() + delta % warpSize);
  return emulator::shuffle("__shfl_down_sync", mask, value, asked);
}

inline void __threadfence() { emulator::grid.fence(); }
inline void __threadfence_block() {}

// ------------------------------------------------- Atomics, for the types that CUDA has them for

template <class T>
emulator::OneOf<T, int, unsigned, unsigned long long, float, double> atomicAdd(
    T* address, emulator::Same<T> value) {
  return emulator::atomically(address, [=](T old) { return old + value; });
}
template <class T>
emulator::OneOf<T, int, unsigned, long long, unsigned long long> atomicMax(
    T* address, emulator::Same<T> value) {
  return emulator::atomically(address, [=](T old) { return std::max(old, value); });
}
template <class T>
emulator::OneOf<T, int, unsigned, unsigned long long, float> atomicExch(T* address,
                                                                        emulator::Same<T> value) {
  return emulator::atomically(address, [=](T) { return value; });
}
template <class T>
emulator::OneOf<T, int, unsigned, unsigned long long, unsigned short> atomicCAS(
    T* address, emulator::Same<T> expected, emulator::Same<T> value) {
  return emulator::atomically(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return emulator::atomically(address, [=](unsigned old) { return old < limit ? old + 1 : 0; });
}

// ------------------------------------------------------------- Cache hints and reinterpretation

inline constexpr auto __ldg = [](const auto* address) { return *address; };
inline constexpr auto __ldcg = __ldg;
inline constexpr auto __ldcs = __ldg;
inline constexpr auto __stcg = [](auto* address, auto value) { *address = value; };
inline constexpr auto __stcs = __stcg;

inline unsigned __float_as_uint(float value) { return emulator::bits<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return emulator::bits<float>(value); }
inline long long __double_as_longlong(double value) { return emulator::bits<long long>(value); }
inline double __longlong_as_double(long long value) { return emulator::bits<double>(value); }

// ------------------------------------------------------------------------------------- Host API

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorName(cudaError_t error) {
  if (error == cudaSuccess) return "cudaSuccess";
  if (error == cudaErrorInvalidValue) return "cudaErrorInvalidValue";
  if (error == cudaErrorMemoryAllocation) return "cudaErrorMemoryAllocation";
  if (error == cudaErrorInvalidConfiguration) return "cudaErrorInvalidConfiguration";
  if (error == cudaErrorInvalidDevice) return "cudaErrorInvalidDevice";
  if (error == cudaErrorNotSupported) return "cudaErrorNotSupported";
  return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
inline cudaError_t cudaPeekAtLastError() { return emulator::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }

inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return emulator::result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return emulator::result(cudaErrorInvalidDevice);
  if (attribute != cudaDevAttrMultiProcessorCount) return emulator::result(cudaErrorInvalidValue);
  return *value = emulator::multiprocessors, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
  return *blocks = 2, cudaSuccess;
}

template <class T>
cudaError_t cudaMalloc(T** pointer, std::size_t bytes) {
  *pointer = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  if (*pointer == nullptr) return emulator::result(cudaErrorMemoryAllocation);
  std::memset(*pointer, 0xff, bytes);  // To NaNs: a GPU would not clear it either.
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) { return std::free(pointer), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes,
                                   cudaMemcpyKind kind, cudaStream_t = nullptr) {
  return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, std::size_t bytes, cudaStream_t = nullptr) {
  if (bytes > 0) std::memset(to, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

// -------------------------------------------------------------------------------------- Launches

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
union cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {

// Each thread has a copy of the arguments, to write to.
template <class... Parameters, std::size_t... i>
EMULATOR_UNSEEN void call(void (*kernel)(Parameters...), const std::tuple<Parameters...>& arguments,
                          std::index_sequence<i...>) {
  kernel(std::get<i>(arguments)...);
}

}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...));
  const uint3 blocks = config->gridDim, threads = config->blockDim;
  if (blocks.volume() == 0 || threads.volume() == 0 || threads.volume() > 1024) {
    return emulator::result(cudaErrorInvalidConfiguration);
  }
  if (config->dynamicSmemBytes > 0) return emulator::result(cudaErrorNotSupported);
  const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  emulator::grid.run(blocks, threads, [&] {
    emulator::call(kernel, copies, std::index_sequence_for<Parameters...>());
  });
  return cudaSuccess;
}
