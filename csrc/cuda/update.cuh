// The update pass: returns at once if the step is skipped; the last block advances the counters.
#pragma once

#include <utility>

#include "../dispatch.h"
#include "arguments.cuh"
#include "block.cuh"
#include "grad_norm.cuh"
#include "vector.cuh"

namespace fusedopt::cuda {

// One chunk's update: the loop around a rule.
template <class Rule, unsigned kUsed, class types>
struct ChunkUpdate {
  using T = typename types::compute_t;
  using param_t = typename types::param_t;
  using grad_t = typename types::grad_t;
  using state_t = typename types::state_t;
  using Coefficients = typename Rule::template Coefficients<T>;
  static constexpr int kStates = num_states<Rule>;
  static constexpr bool used(int k) { return (kUsed >> k & 1) != 0; }

  // kVector neighboring elements of all arrays, in registers.
  template <int kVector>
  struct Elements {
    Vector<param_t, kVector> param;
    Vector<grad_t, kVector> grad;
    Vector<state_t, kVector> state[state_slots<Rule>];
  };

  template <int kVector>
  struct Arrays {
    Stretch<param_t, kVector> param;
    Stretch<grad_t, kVector> grad;
    void* const* state;
    int64_t begin;

    __device__ Arrays(const TensorEntry& tensor, const void* grad, Chunk chunk)
        : param(tensor.param, chunk.begin()),
          grad(grad, chunk.begin()),
          state(tensor.state),
          begin(chunk.begin()) {}

    __device__ Stretch<state_t, kVector> states(int k) const { return {state[k], begin}; }

    __device__ bool aligned() const {
      bool result = param.aligned() && grad.aligned();
#pragma unroll
      for (int k = 0; k < kStates; ++k) result = result && (!used(k) || states(k).aligned());
      return result;
    }

    __device__ Elements<kVector> load(int first) const {
      Elements<kVector> elements{};  // states that are not used stay zero
      elements.param = param.load(first);
      elements.grad = grad.load(first);
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        if (used(k)) elements.state[k] = states(k).load(first);
      }
      return elements;
    }

    __device__ void store(int first, const Elements<kVector>& elements) const {
      param.store(first, elements.param);
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        if (used(k)) states(k).store(first, elements.state[k]);
      }
    }
  };

  template <int kVector, size_t... k>
  __device__ static void update(Elements<kVector>& elements, const Coefficients& c, T grad_factor,
                                std::index_sequence<k...>) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      T param = widen(elements.param.at[i]);
      T state[state_slots<Rule>] = {used(k) ? widen(elements.state[k].at[i]) : T(0)...};
      Rule::template update<kUsed>(c, widen(elements.grad.at[i]) * grad_factor, param, state[k]...);
      elements.param.at[i] = narrow<param_t>(param);
      ((used(k) ? void(elements.state[k].at[i] = narrow<state_t>(state[k])) : void()), ...);
    }
  }

  __device__ static void run(const TensorEntry& tensor, const void* grad, Chunk chunk,
                             const Prepared<Rule>& prepared) {
    constexpr int kVector = vector_size<param_t>;
    constexpr int kRow = kThreads * kVector;
    constexpr int kRowsInFlight = sizeof(Elements<kVector>) <= 80 ? 2 : 1;  // before the first use
    constexpr auto kAllStates = std::make_index_sequence<kStates>{};
    const Coefficients c = rounded<Rule, T>(prepared.coefficients);
    const T grad_factor = static_cast<T>(prepared.grad_factor);
    const int size = static_cast<int>(chunk.size(tensor.numel));

    const Arrays<kVector> arrays(tensor, grad, chunk);
    const int aligned_size = arrays.aligned() ? size : 0;
    int first = threadIdx.x * kVector;
#pragma unroll 1
    for (; first + (kRowsInFlight - 1) * kRow + kVector <= aligned_size;
         first += kRowsInFlight * kRow) {
      Elements<kVector> rows[kRowsInFlight];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) rows[i] = arrays.load(first + i * kRow);
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        update(rows[i], c, grad_factor, kAllStates);
        arrays.store(first + i * kRow, rows[i]);
      }
    }
    // The edges, and tensors that are not aligned: the same, element by element.
    const Arrays<1> scalars(tensor, grad, chunk);
#pragma unroll 1
    for (; first < size; first += kRow) {
#pragma unroll 1
      for (int i = first; i < first + kVector && i < size; ++i) {
        Elements<1> element = scalars.load(i);
        update(element, c, grad_factor, kAllStates);
        scalars.store(i, element);
      }
    }
  }
};

// What a block keeps between chunks: the last tensor's coefficients, as most tensors share them.
template <class Rule>
struct Memo {
  uint32_t group;
  float scalars[kMaxScalars];
  Prepared<Rule> prepared;

  // By thread 0, between two barriers.
  __device__ void prepare_for(const TensorEntry& tensor, const Group& its_group,
                              double grad_factor) {
    float now[kMaxScalars] = {};
    load_scalars<Rule>(tensor, now);
    bool same = tensor.group == group;
    for (int k = 0; k < num_scalars<Rule>; ++k) same = same && now[k] == scalars[k];
    if (same) return;
    group = tensor.group;
    for (int k = 0; k < num_scalars<Rule>; ++k) scalars[k] = now[k];
    prepared = prepare<Rule>(its_group, now, grad_factor);
  }
};

// A Memo with its constructor taken away, as shared memory has none.
template <class Rule>
struct Shared {
  Decision decision;
  alignas(8) unsigned char memo[sizeof(Memo<Rule>)];
};

template <class Rule>
__device__ void update_chunk(const Pass& pass, Chunk chunk, Memo<Rule>& memo, double grad_factor) {
  const TensorEntry& tensor = pass.tensors[chunk.tensor];
  const Group& group = pass.groups[tensor.group];
  __syncthreads();
  if (threadIdx.x == 0) memo.prepare_for(tensor, group, grad_factor);
  __syncthreads();
  visit_types(tensor, [&](auto types) {
    visit_variant<Rule>(group.states_used, [&](auto used) {
      ChunkUpdate<Rule, used(), decltype(types)>::run(tensor, pass.grads[chunk.tensor], chunk,
                                                      memo.prepared);
    });
  });
}

// What the last block does once all elements are updated, or none.
template <class Rule>
__device__ void finish(const Pass& pass, Decision decision) {
  for (int64_t t = threadIdx.x; t < pass.num_tensors && !decision.skip; t += kThreads) {
    const TensorEntry& tensor = pass.tensors[t];
    if (pass.grads[t] != nullptr) advance<Rule>(tensor, pass.groups[tensor.group]);
  }
  double sum = 0;
  if (!pass.options.measure) sum = total<SumOfSquares>(pass.chunk_sums, pass.num_chunks);
  if (threadIdx.x == 0) {
    if (pass.options.measure) sum = pass.control->sum_of_squares;
    record(*pass.control, pass.options.measure ? decision : decide(pass.options, sum), sum);
  }
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
  }
  __syncthreads();
  const Decision decision = shared.decision;
  // In reverse: what the norm pass read last is still in the cache.
  for (int64_t i = pass.num_chunks - 1 - blockIdx.x; i >= 0 && !decision.skip; i -= gridDim.x) {
    const Chunk chunk = pass.chunks[i];
    if (!pass.options.measure) {
      const double sum = chunk_norm<SumOfSquares>(pass, chunk);
      if (threadIdx.x == 0) pass.chunk_sums[i] = sum;
    }
    if (pass.grads[chunk.tensor] != nullptr) {
      update_chunk(pass, chunk, memo, decision.grad_factor);
    }
  }
  if (is_last_block(arguments.ticket)) finish<Rule>(pass, decision);
}

}  // namespace fusedopt::cuda
