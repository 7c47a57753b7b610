// The update of one chunk: the loops around a rule.
#pragma once

#include <cmath>
#include <utility>

#include "core/coefficients.h"
#include "core/dispatch.h"
#include "core/trust.h"
#include "cuda/array_types.cuh"
#include "cuda/block.cuh"
#include "cuda/coefficient_cache.cuh"
#include "cuda/segments.cuh"
#include "cuda/telemetry.cuh"
#include "cuda/vector.cuh"
#include "cuda/workers.cuh"
#include "rules/rule.h"

namespace fusedopt::cuda {

// A block's shared memory.
template <class Rule>
struct Shared {
  Decision decision;
  ChunkSegments segments;
  SquareLanes<Rule> lanes;
  alignas(kVectorBytes) float norm_lanes[kRowBytes / sizeof(raw16)];  // see SharedLanes
  double values[2];                                                   // for BlockWorkers
  // No register keeps these while a chunk is updated.
  int index;           // of the chunk
  bool has_own_coefs;  // not all chunks have the same clip coefficient
  const void* const* grads;
  const Group* groups;
  MixedPointers pointers;
  // Raw storage: __shared__ objects can't have constructors.
  alignas(8) unsigned char cache[sizeof(CoefficientCache<Rule>)];
};

// One chunk's update: the loops around a rule.
template <class Rule, class types>
class ChunkUpdate {
  using T = typename types::compute_t;
  using stored_t = typename types::stored_t;
  using Row = typename types::row;
  static constexpr int kStates = num_states<Rule>;
  static constexpr int kVector = Row::kVector;
  static constexpr int kRow = kThreads * kVector;

 public:
  __device__ ChunkUpdate(const StepParams& step, Chunk chunk, const CoefficientCache<Rule>& cache,
                         Shared<Rule>& shared)
      : segments_(shared.segments),
        // always_used() is a constant, so that the compiler removes the tests for these states.
        used_((step.groups[step.shapes[chunk.tensor].group].states_used | always_used<Rule>()) &
              loaded_states<Rule>),
        size_(static_cast<int>(chunk.size(step.shapes[chunk.tensor].numel))),
        measures_(measures_grads<Rule>(step)),
        telemetry_(step.chunk_measures != nullptr),
        is_uniform_(!reads_grads<Rule> || segments_.is_uniform(step.shapes[chunk.tensor])),
        format_(step.shapes[chunk.tensor]),
        coefficients_(cache.template factors<T>().coefficients),
        grad_factor_(cache.template factors<T>().grad_factor),
        random_(cache.random),
        row_(step.shapes[chunk.tensor].param),
        arrays_(Pointers<Rule>(step, chunk.tensor), step.grads[chunk.tensor],
                step.shapes[chunk.tensor], chunk, used_, shared.pointers),
        squares_(shared.lanes.bytes, step.shapes[chunk.tensor].param),
        norm_lanes_(shared.norm_lanes) {}

  // Updates the chunk's whole rows, if all arrays are aligned, and returns the first element that
  // is left. If no pass has measured the gradients before, `mine` gets this thread's measurements
  // of the whole chunk. With telemetry, and for a trust ratio, squares are added to the lanes.
  __device__ __forceinline__ int run(GradMeasures& mine) {
    Meter meter{NormLanes(norm_lanes_, row_)};
    if (sums_squares()) squares_.clear();
    __syncthreads();  // thread 0 has written the pointers
    const int done = update_vectors(meter);
    if (measures_) measure_rest(done, meter);
    mine = meter.result(format_);
    return done;
  }

  // Updates the elements that are left: all of them if an array is not aligned. Neighboring threads
  // take neighboring elements, so that single accesses are coalesced too. Of mixed formats, a warp
  // takes kCount * kWarpSize neighbors, and its threads stay together: see blocks.cuh.
  __device__ __forceinline__ void update_singles(int done) {
    __syncthreads();  // thread 0 has written the pointers, and lanes go to other threads
    constexpr int kCount = kVectorBytes / sizeof(T);
    constexpr int kStride = types::kSingleStride;
    const int thread = computed_anew(static_cast<int>(threadIdx.x));
    const int lane = thread % kStride;
    const int of_warp = done + (thread - lane) * kCount;
#pragma unroll 1
    for (int first = of_warp + lane; first - (types::is_mixed ? lane : 0) < size_;
         first += kCount * kThreads) {
      Elements<kCount> singles = arrays_.template load<kCount>(
          [&](auto array) { return array.template load_each<kCount, kStride>(first, size_); });
      arrays_.widen(singles, kAllStates);
      update<kStride>(
          first, singles, [&](T grad, int k) { return scaled_grad(grad, first + k * kStride); },
          kAllStates);
      arrays_.template narrow<kStride>(first, size_, random_, singles, kAllStates);
      if (sums_changes()) {
        const auto before = arrays_.param.template load_each<kCount, kStride>(first, size_);
        squares_.template add<kStride>(first, size_, arrays_.param.widened(before),
                                       arrays_.param.widened(singles.param), format_);
      }
      arrays_.store(singles, [&](auto array, auto& it) {
        array.template store_each<kCount, kStride>(first, size_, it);
      });
    }
  }

 private:
  using NormLanes = typename types::template norm_lanes<SumOfSquares>;
  using Meter = GradMeter<SumOfSquares, stored_t, kVector, NormLanes>;
  using lane_t = std::conditional_t<Rule::kIsTrustPass, double, T>;

  __device__ bool sums_squares() const { return Rule::kIsTrustPass || telemetry_; }
  __device__ bool sums_changes() const { return !Rule::kIsTrustPass && telemetry_; }

  // Some elements of all arrays, in registers.
  template <int kCount>
  struct Elements {
    Vector<stored_t, kCount> param;
    Vector<stored_t, kCount> grad;
    Vector<stored_t, kCount> state[state_slots<Rule>];
  };

  struct Arrays {
    typename types::param_slice param;
    typename types::grad_slice grad;
    typename types::state_slice state[state_slots<Rule>];
    unsigned used;  // bit k: state[k] is used

    __device__ Arrays(const Pointers<Rule>& tensor, const void* grads, const TensorShape& shape,
                      Chunk chunk, unsigned used, MixedPointers& shared)
        : Arrays(tensor, grads, shape, chunk, used, shared,
                 std::make_index_sequence<state_slots<Rule>>{}) {}

    template <size_t... k>
    __device__ Arrays(const Pointers<Rule>& tensor, const void* grads, const TensorShape& shape,
                      Chunk chunk, unsigned used, MixedPointers& shared, std::index_sequence<k...>)
        : param(tensor.param(shape), chunk.begin(), shape, 0, shared),
          grad(Array{const_cast<void*>(grads), nullptr, shape.grad, 0}, chunk.begin(), shape, 1,
               shared),
          state{{tensor.state(shape, k), chunk.begin(), shape, 2 + static_cast<int>(k), shared}...},
          used(used) {}

    __device__ bool has(int k) const { return (used >> k & 1) != 0; }

    __device__ bool aligned() const {
      bool result = grad.template aligned<kVector>();
      if constexpr (reads_params<Rule>) result = result && param.template aligned<kVector>();
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        result = result && (!has(k) || state[k].template aligned<kVector>());
      }
      return result;
    }

    // `load` takes a Slice of any type. Unused states stay zero.
    template <int kCount, class Load>
    __device__ Elements<kCount> load(Load load) const {
      Elements<kCount> elements{};
      if constexpr (reads_params<Rule>) elements.param = load(param);
      if constexpr (reads_grads<Rule>) elements.grad = load(grad);
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        if (has(k)) elements.state[k] = load(state[k]);
      }
      return elements;
    }

    template <int kCount, class Store>
    __device__ void store(const Elements<kCount>& elements, Store store) const {
      if constexpr (!Rule::kIsTrustPass) store(param, elements.param);
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        if (has(k) && is_stored<Rule>(k)) store(state[k], elements.state[k]);
      }
    }

    template <int kCount, size_t... k>
    __device__ __forceinline__ void widen(Elements<kCount>& elements,
                                          std::index_sequence<k...>) const {
      if constexpr (reads_params<Rule>) param.widen(elements.param);
      if constexpr (reads_grads<Rule>) grad.widen(elements.grad);
      ((has(k) ? state[k].template widen<Rule::kStates[k].coding>(elements.state[k]) : void()),
       ...);
    }

    // The elements first, first + kStride, ... of the chunk.
    template <int kStride, int kCount, size_t... k>
    __device__ __forceinline__ void narrow(int first, int size, const RandomBits& random,
                                           Elements<kCount>& elements,
                                           std::index_sequence<k...>) const {
      if constexpr (!Rule::kIsTrustPass) {
        param.template narrow<kStride>(first, size, random, elements.param);
      }
      ((has(k) && is_stored<Rule>(k) ? state[k].template narrow<kStride, Rule::kStates[k].coding>(
                                           first, size, random, elements.state[k])
                                     : void()),
       ...);
    }
  };

  __device__ __forceinline__ int update_vectors(Meter& meter) {
    constexpr int kBytes = sizeof(Elements<kVector>) + kVector * sizeof(double);
    // Rows that are loaded before the first is used. The limit keeps the kernel below 128
    // registers. float64 and mixed formats get one row: their arithmetic needs registers itself.
    constexpr int kRowsInFlight =
        kBytes <= 144 && sizeof(T) == sizeof(float) && !types::is_mixed ? 2 : 1;
    if (!arrays_.aligned() || !is_uniform_) return 0;
    const int place = row_.place();
    int done = 0;
#pragma unroll 1
    for (; done + kRowsInFlight * kRow <= size_; done += kRowsInFlight * kRow) {
      Elements<kVector> rows[kRowsInFlight];
      const int first = done + place;
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        rows[i] = arrays_.template load<kVector>(
            [&](auto array) { return array.template load<kVector>(first + i * kRow); });
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        arrays_.widen(rows[i], kAllStates);
        if (measures_) meter.add(rows[i].grad, format_, telemetry_, first + i * kRow);
        const T factor = grad_factor_;
        update<1>(
            first + i * kRow, rows[i], [&](T grad, int) { return grad * factor; }, kAllStates);
        arrays_.template narrow<1>(first + i * kRow, size_, random_, rows[i], kAllStates);
        if (sums_changes()) {
          // Load the parameter again, from the cache: no register is left for it.
          const auto before = arrays_.param.template load<kVector>(first + i * kRow);
          const auto old = arrays_.param.widened(before);
          const auto changed = arrays_.param.widened(rows[i].param);
          row_.in_turn(first + i * kRow, [&] {
            squares_.template add<1>(first + i * kRow, size_, old, changed, format_);
          });
        }
        arrays_.store(rows[i], [&](auto array, auto& it) { array.store(first + i * kRow, it); });
      }
    }
    return done;
  }

  __device__ __forceinline__ void measure_rest(int done, Meter& meter) {
#pragma unroll 1
    for (int row = done; row < size_; row += kRow) {
      const int first = row + row_.place();
      const auto grads = arrays_.grad.template load_some<kVector>(first, size_);
      meter.add(arrays_.grad.widened(grads), format_, telemetry_, first);
    }
  }

  // The gradient of element i of the chunk, unscaled and clipped.
  __device__ __forceinline__ T scaled_grad(T grad, int i) const {
    if (is_uniform_) return grad * grad_factor_;
    if (i >= size_) return 0;
    return scaled(grad, segments_.factor_of(i)) * grad_factor_;
  }

  // Updates the elements first, first + kStride, ... of the chunk. scale(grad, i) unscales and
  // clips the gradient of elements[i].
  template <int kStride, int kCount, class Scale, size_t... k>
  __device__ __forceinline__ void update([[maybe_unused]] int first, Elements<kCount>& elements,
                                         Scale scale, std::index_sequence<k...>) const {
    [[maybe_unused]] Terms<kCount> terms;
    // One instruction rounds 2 values to 16 bits.
    constexpr int kTogether = sizeof(stored_t) == sizeof(raw16) ? 2 : 1;
#pragma unroll
    for (int begin = 0; begin < kCount; begin += kTogether) {
      T param[kTogether], grad[kTogether], state[state_slots<Rule>][kTogether];
      format_.template visit<stored_t>([&](auto half) {
        widen<decltype(half)>(elements.param, begin, param);
        widen<decltype(half)>(elements.grad, begin, grad);
        (widen<decltype(half)>(elements.state[k], begin, state[k]), ...);
      });
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        (square<k>(state[k][i]), ...);
        [[maybe_unused]] const T before = param[i];
        update_element<Rule>(used_, coefficients_, scale(grad[i], begin + i), param[i],
                             state[k][i]...);
        if constexpr (Rule::kIsTrustPass) {
          terms.params[begin + i] = before;
          terms.terms[begin + i] = param[i];
        }
        (root<k>(state[k][i]), ...);
      }
      format_.template visit<stored_t>([&](auto half) {
        if constexpr (!Rule::kIsTrustPass) narrow<decltype(half)>(param, begin, elements.param);
        (narrow<decltype(half)>(state[k], begin, elements.state[k]), ...);
      });
    }
    if constexpr (Rule::kIsTrustPass) add_terms<kStride>(first, terms);
  }

  // The parameters before a first pass, and the terms that it finds.
  template <int kCount>
  struct Terms {
    T params[kCount], terms[kCount];
  };

  template <int kStride, int kCount>
  __device__ __forceinline__ void add_terms(int first, const Terms<kCount>& terms) const {
    const auto add = [&] {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int i = first + k * kStride;
        if (kStride != 1 && i >= size_) continue;
        squares_.add(i, reads_params<Rule> ? terms.params[k] : T{0}, terms.terms[k]);
      }
    };
    if constexpr (kStride == 1) {
      row_.in_turn(first, add);
    } else {
      add();
    }
  }

  // States of 8 bits may be roots between widen() and narrow(). The compiler finds that a rule has
  // computed the root before.
  template <size_t k>
  __device__ __forceinline__ void square(T& value) const {
    if constexpr (may_be_root<k>) {
      if (arrays_.state[k].is_in_blocks()) value *= value;
    }
  }
  template <size_t k>
  __device__ __forceinline__ void root(T& value) const {
    if constexpr (may_be_root<k>) {
      if (arrays_.state[k].is_in_blocks()) value = std::sqrt(value);
    }
  }
  template <size_t k>
  static constexpr bool may_be_root = types::is_mixed && Rule::kStates[k].coding == Coding::kRoot;

  static constexpr auto kAllStates = std::make_index_sequence<kStates>{};

  const ChunkSegments& segments_;
  const unsigned used_;  // bit k: the rule's kStates[k] is used
  const int size_;
  const bool measures_, telemetry_, is_uniform_;
  const Format format_;
  const typename Rule::template Coefficients<T> coefficients_;
  const volatile T& grad_factor_;  // in shared memory, as no register is left for it
  const RandomBits& random_;       // in shared memory, as no register is left for it
  const Row row_;
  const Arrays arrays_;
  const LanesOf<lane_t> squares_;
  float* const norm_lanes_;  // in shared memory
};

}  // namespace fusedopt::cuda
