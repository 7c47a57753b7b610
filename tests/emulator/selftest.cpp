// Tests the emulator itself.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

namespace {

constexpr unsigned kAllLanes = 0xffffffff;

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), unsigned blocks, unsigned threads,
                   const Arguments& arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

// What a launch throws, or nothing.
template <class Arguments>
std::string error_of(void (*kernel)(Arguments), unsigned blocks, unsigned threads,
                     const Arguments& arguments) {
  try {
    launch(kernel, blocks, threads, arguments);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// ------------------------------------------------------------------------------------ Reduction

constexpr int kThreads = 256;

__device__ double block_sum(double value) {
  __shared__ double of_warp[kThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (double partial : of_warp) sum += partial;
  __syncthreads();
  return sum;
}

struct SumArguments {
  const float* values;
  int size;
  double* partials;
  unsigned* ticket;
  double* sum;
};

// The last block to finish adds up what the others left.
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumArguments a) {
  __shared__ bool is_last;
  double sum = 0;
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < a.size;
       i += gridDim.x * blockDim.x) {
    sum += __ldcs(a.values + i);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    a.partials[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  sum = block_sum(threadIdx.x < gridDim.x ? __ldcg(a.partials + threadIdx.x) : 0);
  if (threadIdx.x == 0) *a.sum = sum;
}

void test_reduction() {
  float* values = nullptr;
  double *partials = nullptr, *sum = nullptr;
  unsigned* ticket = nullptr;
  constexpr int kSize = 10000, kBlocks = 7;
  CHECK(cudaMalloc(&values, kSize * sizeof *values) == cudaSuccess);
  CHECK(cudaMalloc(&partials, kBlocks * sizeof *partials) == cudaSuccess);
  CHECK(cudaMalloc(&sum, sizeof *sum) == cudaSuccess);
  CHECK(cudaMalloc(&ticket, sizeof *ticket) == cudaSuccess);
  CHECK(cudaMemsetAsync(ticket, 0, sizeof *ticket, nullptr) == cudaSuccess);
  for (int i = 0; i < kSize; ++i) values[i] = float(i);
  for (unsigned seed = 0; seed < 20; ++seed) {
    emulator::set_block_order(seed);
    *sum = 0;
    CHECK(launch(sum_kernel, kBlocks, kThreads, {values, kSize, partials, ticket, sum}) ==
          cudaSuccess);
    CHECK(*sum == kSize * (kSize - 1) / 2);
    CHECK(*ticket == 0);
  }
  for (void* memory : {(void*)values, (void*)partials, (void*)sum, (void*)ticket}) cudaFree(memory);
}

struct Nothing {};

__global__ void reduce_only_kernel(Nothing) { block_sum(threadIdx.x); }

void measure_reduction() {
  constexpr int kBlocks = 500;
  const std::clock_t start = std::clock();
  launch(reduce_only_kernel, kBlocks, kThreads, {});
  const double seconds = double(std::clock() - start) / CLOCKS_PER_SEC;
  std::printf("a block's sum over %d threads takes %.0f us\n", kThreads, 1e6 * seconds / kBlocks);
}

// --------------------------------------------------------------------------- Shuffles and votes

struct WarpArguments {
  unsigned* failures;  // A bit per expectation that was not met.
};

__device__ void expect(const WarpArguments& a, int number, bool met) {
  if (!met) *a.failures |= 1u << number;
}

// Of 40 threads: a full warp, and one of eight lanes.
__global__ void warp_kernel(WarpArguments a) {
  const unsigned lane = threadIdx.x % warpSize, lanes = threadIdx.x < 32 ? 32 : 8;
  expect(a, 0, __shfl_sync(kAllLanes, 10 * lane, 3) == 30);
  expect(a, 1, __shfl_sync(kAllLanes, lane, 1, 4) == (lane & ~3u) + 1);
  expect(a, 2, __shfl_xor_sync(kAllLanes, double(lane), 5) == double(lane ^ 5));
  expect(a, 3, __shfl_down_sync(kAllLanes, lane, 3, 8) == (lane % 8 + 3 < 8 ? lane + 3 : lane));
  const unsigned odd = __ballot_sync(kAllLanes, lane % 2);
  expect(a, 4, odd == (lanes == 32 ? 0xaaaaaaaa : 0xaa));
  expect(a, 5, __any_sync(kAllLanes, lane == 7) == 1 && __any_sync(kAllLanes, lane == 99) == 0);
  expect(a, 6, __syncthreads_or(threadIdx.x == 39) == 1 && __syncthreads_or(0) == 0);
  if (lane < 4) {
    const float2 pair = __shfl_sync(0xf, float2{1, float(lane)}, 2);
    expect(a, 7, pair.x == 1 && pair.y == 2);
  } else if (lane % 2 == 1) {
    expect(a, 8, __ballot_sync(odd & ~0xfu, 1) == (odd & ~0xfu));
  }
  __syncwarp();
  const float value = float(lane);
  expect(a, 9, __uint_as_float(__float_as_uint(value)) == value);
  expect(a, 10, __longlong_as_double(__double_as_longlong(lane)) == value);
  expect(a, 11, __ffs(0) == 0 && __ffs(int(odd)) == 2 && __ffs(int(0x80000000)) == 32);
}

void test_warps() {
  unsigned failures = 0;
  for (unsigned seed = 0; seed < 20; ++seed) {
    emulator::set_block_order(seed);
    CHECK(launch(warp_kernel, 2, 40, {&failures}) == cudaSuccess);
    CHECK(failures == 0);
  }
}

// -------------------------------------------------------------------------------------- Atomics

struct AtomicArguments {
  unsigned* count;
  unsigned long long* total;
  float* sum;
  double* sum2;
  int* maximum;
  unsigned* first;
};

__global__ void atomic_kernel(AtomicArguments a) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(a.count, 1);
  atomicAdd(a.total, i);
  atomicAdd(a.sum, 0.5f);
  atomicAdd(a.sum2, 0.25);
  atomicMax(a.maximum, int(i) - 100);
  if (atomicCAS(a.first, 0, i + 1) == 0) atomicExch(a.first, i + 1);
}

void test_atomics() {
  unsigned count = 0, first = 0;
  unsigned long long total = 0;
  float sum = 0;
  double sum2 = 0;
  int maximum = -1000;
  CHECK(launch(atomic_kernel, 3, 50, {&count, &total, &sum, &sum2, &maximum, &first}) ==
        cudaSuccess);
  CHECK(count == 150 && total == 150 * 149 / 2 && sum == 75 && sum2 == 37.5 && maximum == 49);
  CHECK(first >= 1 && first <= 150);
}

// --------------------------------------------------------------------------------------- Memory

struct CopyArguments {
  const float* from;
  float* to;
};

__global__ void copy_kernel(CopyArguments a) {
  const float4 values =
      emulator::load_global(reinterpret_cast<const float4*>(a.from) + threadIdx.x);
  emulator::store_global(a.to + threadIdx.x, values.x + values.w);
}

void test_memory() {
  alignas(16) float from[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  float to[2] = {};
  emulator::reset_counters();
  CHECK(error_of(copy_kernel, 1, 2, {from, to}) == "");
  CHECK(to[0] == 5 && to[1] == 13);
  CHECK(error_of(copy_kernel, 3, 1, {from, to}) == "");
  CHECK(emulator::grid.traffic(0).loaded == 32 && emulator::grid.traffic(0).stored == 8);
  CHECK(emulator::grid.traffic(1).loaded == 48 && emulator::grid.traffic(1).stored == 12);
  CHECK(error_of(copy_kernel, 1, 1, {from + 1, to}) ==
        "an access of 16 bytes at an address that is not a multiple of 16");
}

// ---------------------------------------------------------------------------------------- Order

struct OrderArguments {
  std::vector<unsigned>* order;
};

__global__ void order_kernel(OrderArguments a) {
  a.order->push_back(blockIdx.x * blockDim.x + threadIdx.x);
}

std::vector<unsigned> order_of(unsigned seed, unsigned blocks, unsigned threads) {
  std::vector<unsigned> order;
  emulator::set_block_order(seed);
  launch(order_kernel, blocks, threads, {&order});
  return order;
}

void test_order() {
  std::vector<unsigned> sorted(100);
  for (unsigned i = 0; i < 100; ++i) sorted[i] = i;
  for (unsigned blocks : {1u, 10u, 100u}) {
    std::vector<unsigned> order = order_of(1, blocks, 100 / blocks);
    CHECK(order == order_of(1, blocks, 100 / blocks));
    CHECK(order != order_of(2, blocks, 100 / blocks));
    CHECK(order != sorted);
    std::sort(order.begin(), order.end());
    CHECK(order == sorted);
  }
}

// ------------------------------------------------------------------------------------ Arguments

struct Counted {
  int value;
  int* out;
};

__global__ void argument_kernel(Counted a, const char* by_conversion) {
  a.value += by_conversion == nullptr;  // In this thread's copy.
  atomicAdd(a.out, a.value);
}

void test_arguments() {
  int out = 0;
  Counted counted{1, &out};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2, 2);
  config.blockDim = dim3(5, 2, 2);
  CHECK(cudaLaunchKernelEx(&config, argument_kernel, counted, nullptr) == cudaSuccess);
  CHECK(out == 2 * 80);
  CHECK(counted.value == 1);
}

__global__ void index_kernel(unsigned* seen) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  ++seen[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

void test_indices() {
  unsigned seen[24 * 24] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2, 3, 4);
  config.blockDim = dim3(4, 3, 2);
  CHECK(cudaLaunchKernelEx(&config, index_kernel, seen) == cudaSuccess);
  CHECK(std::count(std::begin(seen), std::end(seen), 1u) == 24 * 24);
}

// --------------------------------------------------------------------------------------- Errors

__global__ void absent_kernel(unsigned who) {
  if (blockIdx.x == 2 && threadIdx.x == who) return;
  __syncthreads();
}
__global__ void mixed_kernel(unsigned who) {
  if (threadIdx.x >= who) {
    __syncthreads();
  } else {
    __ballot_sync(0xff, 1);
  }
}
__global__ void mask_kernel(unsigned mask) { __syncwarp(threadIdx.x < 16 ? mask : ~mask); }
__global__ void shuffle_kernel(unsigned lane) { __shfl_sync(kAllLanes, 1, int(lane)); }
__global__ void throwing_kernel(unsigned who) {
  if (threadIdx.x == who) throw std::runtime_error("thrown by a kernel");
  __syncthreads();
}

void test_errors() {
  for (unsigned seed = 0; seed < 20; ++seed) {
    emulator::set_block_order(seed);
    CHECK(error_of(absent_kernel, 3, 256, 7u) ==
          "block (2, 0, 0): no thread can go on: threads 0-6 in __syncthreads; thread 7 exited; "
          "threads 8-255 in __syncthreads");
    CHECK(error_of(mixed_kernel, 1, 64, 5u) ==
          "block (0, 0, 0): no thread can go on: threads 0-4 in __ballot_sync with mask "
          "0x000000ff; threads 5-63 in __syncthreads");
    CHECK(error_of(mask_kernel, 1, 32, 0xffffu) == "");
    CHECK(error_of(mask_kernel, 1, 32, 0x7fffu) ==
          "block (0, 0, 0): thread 15 in __syncwarp with mask 0x00007fff, which leaves it out");
    CHECK(error_of(mask_kernel, 1, 16, 0u).find("which leaves it out") != std::string::npos);
    CHECK(error_of(shuffle_kernel, 1, 20, 19u) == "");
    CHECK(error_of(shuffle_kernel, 1, 20, 20u).find("asking a lane that is not there") !=
          std::string::npos);
    CHECK(error_of(throwing_kernel, 2, 64, 33u) == "thrown by a kernel");
    CHECK(error_of(absent_kernel, 2, 256, 7u) == "");  // Launches go on after all that.
  }
}

// ------------------------------------------------------------------------------------- Host API

void test_host() {
  emulator::reset_counters();
  CHECK(launch(reduce_only_kernel, 1, 1025, {}) == cudaErrorInvalidConfiguration);
  CHECK(launch(reduce_only_kernel, 0, 256, {}) == cudaErrorInvalidConfiguration);
  CHECK(emulator::launches() == 0);
  CHECK(cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
  CHECK(launch(reduce_only_kernel, 1, 256, {}) == cudaSuccess && emulator::launches() == 1);

  int value = 0;
  emulator::set_multiprocessor_count(5);
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess &&
        value == 5);
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 1) ==
        cudaErrorInvalidDevice);
  CHECK(std::string(cudaGetErrorName(cudaErrorInvalidDevice)) == "cudaErrorInvalidDevice");
  CHECK(cudaGetDeviceCount(&value) == cudaSuccess && value == 1);
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, sum_kernel, kThreads, 0) ==
        cudaSuccess);
  CHECK(value == 2);
}

// Launches from several threads take turns, on the same fibers.
void test_threads() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(test_reduction);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  test_reduction();
  measure_reduction();
  test_warps();
  test_atomics();
  test_memory();
  test_order();
  test_arguments();
  test_indices();
  test_errors();
  test_host();
  test_threads();
  std::puts("ok");
}
