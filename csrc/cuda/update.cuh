// The update pass: returns at once if the step is skipped; the last block advances the counters.
#pragma once

#include <utility>

#include "../dispatch.h"
#include "arguments.cuh"
#include "block.cuh"
#include "observe.cuh"
#include "own_clips.cuh"
#include "telemetry.cuh"
#include "vector.cuh"

namespace fusedopt::cuda {

// One chunk's update: the loop around a rule.
template <class Rule, class types>
struct ChunkUpdate {
  using T = typename types::compute_t;
  using param_t = typename types::param_t;
  using grad_t = typename types::grad_t;
  using state_t = typename types::state_t;
  using Coefficients = typename Rule::template Coefficients<T>;
  static constexpr int kStates = num_states<Rule>;

  // Some elements of all arrays, in registers.
  template <int kCount>
  struct Elements {
    Vector<param_t, kCount> param;
    Vector<grad_t, kCount> grad;
    Vector<state_t, kCount> state[state_slots<Rule>];
  };

  struct Arrays {
    Stretch<param_t> param;
    Stretch<grad_t> grad;
    Stretch<state_t> state[state_slots<Rule>];
    unsigned used;  // bit k: state[k] is there

    __device__ Arrays(const TensorEntry& tensor, const void* grad, Chunk chunk, unsigned used)
        : param(tensor.param, chunk.begin()), grad(grad, chunk.begin()), used(used) {
#pragma unroll
      for (int k = 0; k < kStates; ++k) state[k] = {tensor.state[k], chunk.begin()};
    }

    __device__ bool has(int k) const { return (used >> k & 1) != 0; }

    template <int kVector>
    __device__ bool aligned() const {
      bool result = param.template aligned<kVector>() && grad.template aligned<kVector>();
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        result = result && (!has(k) || state[k].template aligned<kVector>());
      }
      return result;
    }

    // `load` takes a Stretch of any type. States that are not used stay zero.
    template <int kCount, class Load>
    __device__ Elements<kCount> load(Load load) const {
      Elements<kCount> elements{};
      elements.param = load(param);
      elements.grad = load(grad);
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        if (has(k)) elements.state[k] = load(state[k]);
      }
      return elements;
    }

    template <int kCount, class Store>
    __device__ void store(const Elements<kCount>& elements, Store store) const {
      store(param, elements.param);
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        if (has(k)) store(state[k], elements.state[k]);
      }
    }
  };

  // `factor(i)`: what the gradient of element i is multiplied by.
  template <int kCount, class Factor, size_t... k>
  __device__ static void update(Elements<kCount>& elements, unsigned used, Converter convert,
                                const Coefficients& c, Factor factor, std::index_sequence<k...>) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      T param = convert.widen(elements.param.at[i]);
      T state[state_slots<Rule>] = {convert.widen(elements.state[k].at[i])...};
      const T grad = convert.widen(elements.grad.at[i]) * factor(i);
      Rule::update(used, c, grad, param, state[k]...);
      elements.param.at[i] = convert.template narrow<param_t>(param);
      ((elements.state[k].at[i] = convert.template narrow<state_t>(state[k])), ...);
    }
  }

  // With `measures`: returns what the thread has seen of the gradients. With `telemetry`: leaves
  // sums of squares in the lanes.
  __device__ __forceinline__ static GradMeasures run(const Pass& pass, Chunk chunk,
                                                     const Prepared<Rule>& prepared,
                                                     const Decision& decision,
                                                     UpdateLanes& update_lanes) {
    constexpr int kVector = vector_size<param_t>;
    constexpr int kRow = kThreads * kVector;
    constexpr int kBytes = sizeof(Elements<kVector>) + sizeof(Lanes<SumOfSquares, kVector>);
    // Before the first use. For 128 registers: float64's divisions and roots need some themselves.
    constexpr int kRowsInFlight = kBytes <= 128 && sizeof(T) == sizeof(float) ? 2 : 1;
    constexpr auto kAllStates = std::make_index_sequence<kStates>{};
    const Coefficients c = rounded<Rule, T>(prepared.coefficients);
    const T grad_factor = static_cast<T>(prepared.grad_factor);
    const TensorEntry& tensor = pass.tensors[chunk.tensor];
    const int size = static_cast<int>(chunk.size(tensor.numel));
    const bool measures = !pass.options.measure;
    const bool telemetry = pass.telemetry.chunks != nullptr;
    const bool by_units = pass.own_clips.coefs != nullptr;

    const unsigned used = pass.groups[tensor.group].states_used |
                          always_used<Rule>();  // which spares most of the questions
    const Converter convert(tensor);
    const Arrays arrays(tensor, pass.grads[chunk.tensor], chunk, used);
    const int aligned_size = arrays.template aligned<kVector>() && !by_units ? size : 0;
    const LanesOf<param_t> squares(update_lanes);
    if (telemetry) squares.clear();
    GradMeter<SumOfSquares, grad_t, kVector> meter;
    int done = 0;
#pragma unroll 1
    for (; done + kRowsInFlight * kRow <= aligned_size; done += kRowsInFlight * kRow) {
      Elements<kVector> rows[kRowsInFlight];
      const int first = done + threadIdx.x * kVector;
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        rows[i] = arrays.template load<kVector>(
            [&](auto array) { return array.template load<kVector>(first + i * kRow); });
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (measures) meter.add(rows[i].grad, convert, telemetry);
        update(rows[i], used, convert, c, [&](int) { return grad_factor; }, kAllStates);
        if (telemetry) {  // the parameter is loaded again, from the cache: no register holds it
          squares.template add<1>(first + i * kRow, size,
                                  arrays.param.template load<kVector>(first + i * kRow),
                                  rows[i].param, convert);
        }
        arrays.store(rows[i], [&](auto array, auto& it) { array.store(first + i * kRow, it); });
      }
    }
    if (measures) {
#pragma unroll 1
      for (int first = done + threadIdx.x * kVector; first < size; first += kRow) {
        meter.add(arrays.grad.template load_some<kVector>(first, size), convert, telemetry);
      }
    }
    // What is left, all of it where an array is not aligned: neighboring threads take neighboring
    // elements, so that single accesses are coalesced too.
    const auto update_singles = [&](auto count, auto factor) {
      constexpr int kCount = decltype(count)::value;
#pragma unroll 1
      for (int first = done + threadIdx.x; first < size; first += kCount * kThreads) {
        Elements<kCount> singles = arrays.template load<kCount>(
            [&](auto array) { return array.template load_each<kCount, kThreads>(first, size); });
        const auto own_factor = [&](int k) { return factor(first + k * kThreads); };
        update(singles, used, convert, c, own_factor, kAllStates);
        if (telemetry) {
          squares.template add<kThreads>(
              first, size, arrays.param.template load_each<kCount, kThreads>(first, size),
              singles.param, convert);
        }
        arrays.store(singles, [&](auto array, auto& it) {
          array.template store_each<kCount, kThreads>(first, size, it);
        });
      }
    };
    if (telemetry) __syncthreads();  // other threads own the lanes than of vectors
    if (by_units) {
      const UnitFactors<T> own(pass, decision.inv_scale, chunk);
      update_singles(std::integral_constant<int, 2>{},
                     [&](int i) { return i < size ? own(i) * grad_factor : T{0}; });
    } else {
      update_singles(std::integral_constant<int, 4>{}, [&](int) { return grad_factor; });
    }
    return meter.result(convert);
  }
};

// What a block keeps between chunks: the last tensor's coefficients, as most tensors share them.
template <class Rule>
struct Memo {
  uint32_t group;
  float scalars[kMaxScalars];
  double grad_factor;
  Prepared<Rule> prepared;

  // By thread 0, between two barriers.
  __device__ void prepare_for(const TensorEntry& tensor, const Group& its_group, double factor) {
    float now[kMaxScalars] = {};
    load_scalars<Rule>(tensor, now);
    bool same = tensor.group == group && factor == grad_factor;
    for (int k = 0; k < num_scalars<Rule>; ++k) same = same && now[k] == scalars[k];
    if (same) return;
    group = tensor.group;
    grad_factor = factor;
    for (int k = 0; k < num_scalars<Rule>; ++k) scalars[k] = now[k];
    prepared = prepare<Rule>(its_group, now, factor);
  }
};

// A Memo with its constructor taken away, as shared memory has none.
template <class Rule>
struct Shared {
  Decision decision;
  int64_t known_unit;
  UpdateLanes lanes;
  alignas(8) unsigned char memo[sizeof(Memo<Rule>)];
};

// With the gradients' squares, if no pass has measured them before.
template <class Rule>
__device__ __forceinline__ void update_chunk(const Pass& pass, int64_t index, Memo<Rule>& memo,
                                             Shared<Rule>& shared) {
  const Chunk chunk = pass.chunks[index];
  const TensorEntry& tensor = pass.tensors[chunk.tensor];
  const Group& group = pass.groups[tensor.group];
  const void* grad = pass.grads[chunk.tensor];
  const bool measures = !pass.options.measure;
  const bool telemetry = pass.telemetry.chunks != nullptr;
  if (grad == nullptr) {
    if (measures && threadIdx.x == 0) pass.chunk_sums[index] = 0;
    return;
  }
  GradMeasures mine{};
  __syncthreads();
  const bool by_units = pass.own_clips.coefs != nullptr;
  if (threadIdx.x == 0) {
    const double factor = by_units ? 1.0 : factor_of_tensor(pass, shared.decision, chunk.tensor);
    memo.prepare_for(tensor, group, factor);
  }
  __syncthreads();
  if (by_units) UnitCoefs(pass, shared.decision, chunk).leave(shared.known_unit, index);
  visit_sizes(tensor, [&](auto types) {
    mine = ChunkUpdate<Rule, decltype(types)>::run(pass, chunk, memo.prepared, shared.decision,
                                                   shared.lanes);
  });
  if (measures) leave_grad_measures<SumOfSquares>(pass, index, mine, telemetry);
  if (telemetry) leave_update_measures(pass, index, shared.lanes);
}

// What the last block does once all elements are updated, or none. `decision` is in shared memory.
template <class Rule>
__device__ void finish(const Pass& pass, Decision& decision) {
  for (int64_t t = threadIdx.x; t < pass.num_tensors && !decision.skip; t += kThreads) {
    const TensorEntry& tensor = pass.tensors[t];
    if (pass.grads[t] != nullptr) advance<Rule>(tensor, pass.groups[tensor.group]);
  }
  if (!pass.options.measure) {
    const double sum = total<SumOfSquares>(pass.chunk_sums, pass.num_chunks);
    if (threadIdx.x == 0) {
      pass.control->sum_of_squares = sum;
      decision = decide(pass.options, sum);
    }
    __syncthreads();
  }
  const bool clips = !decision.skip && pass.own_clips.units != nullptr;
  const double smallest = clips ? smallest_coef(pass, decision) : decision.clip_coef;
  if (pass.learns && is_to_be_observed(pass.options, decision)) {
    observe(pass, decision);
  }
  if (clips) {
    __syncthreads();
    if (threadIdx.x == 0) decision.clip_coef = smallest;
    __syncthreads();
  }
  if (pass.telemetry.chunks != nullptr) {
    if (threadIdx.x == 0) record_step<Rule>(pass, decision);
    record_params(pass, decision);
  }
  __syncthreads();  // the number of steps, which rows are found by, has been read
  if (threadIdx.x == 0) record(*pass.control, decision, pass.control->sum_of_squares);
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, 2)
    update_kernel(const __grid_constant__ Arguments<kSmall> arguments) {
  __shared__ Shared<Rule> shared;
  Memo<Rule>& memo = *reinterpret_cast<Memo<Rule>*>(shared.memo);
  const Pass pass = arguments.on_device();
  if (threadIdx.x == 0) {
    shared.decision = decide(pass.options, pass.options.measure ? pass.control->sum_of_squares : 0);
    memo.group = UINT32_MAX;
    shared.known_unit = -1;
  }
  __syncthreads();
  // In reverse: what the norm pass read last is still in the cache.
  for (int64_t i = pass.num_chunks - 1 - blockIdx.x; i >= 0 && !shared.decision.skip;
       i -= gridDim.x) {
    update_chunk(pass, i, memo, shared);
  }
  if (is_last_block(arguments.ticket)) finish<Rule>(pass, shared.decision);
}

}  // namespace fusedopt::cuda
