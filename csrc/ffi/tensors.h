// The buffers of a compiled program as tensors of the boundary in C.
#pragma once

#include <xla/ffi/api/ffi.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "c/fusedopt.h"

namespace fusedopt {

namespace ffi = xla::ffi;

inline ffi::Error failure(const std::string& why) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, why);
}

inline int32_t dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32:
      return FUSEDOPT_FLOAT32;
    case ffi::DataType::F64:
      return FUSEDOPT_FLOAT64;
    case ffi::DataType::BF16:
      return FUSEDOPT_BFLOAT16;
    case ffi::DataType::F16:
      return FUSEDOPT_FLOAT16;
    default:
      return -1;
  }
}

// A step over these arrays. It clips at the limit, or never if that is infinite.
inline fusedopt_step step_of(void* const* arrays, const void* const* grads, const double* options,
                             double max_grad_norm, bool skip_nonfinite) {
  fusedopt_step step{};
  step.arrays = arrays;
  step.grads = grads;
  step.options = options;
  step.max_grad_norm = max_grad_norm;
  step.measure = skip_nonfinite || std::isfinite(max_grad_norm);
  step.skip_nonfinite = skip_nonfinite;
  return step;
}

// Lends the threads of XLA to a step, which must end before `threads` does.
inline void lend(ffi::ThreadPool& threads, fusedopt_step& step) {
  step.threads = std::max(1, static_cast<int32_t>(threads.num_threads()));
  step.pool = {&threads, [](void* pool, void (*task)(void*), void* argument) {
                 static_cast<ffi::ThreadPool*>(pool)->Schedule([=] { task(argument); });
               }};
}

struct FreePlan {
  void operator()(fusedopt_plan* plan) const { fusedopt_free_plan(plan); }
};
using Plan = std::unique_ptr<fusedopt_plan, FreePlan>;

// The gradients, and the sizes and dtypes that parameters and states share with them.
struct Tensors {
  std::vector<const void*> grads;
  std::vector<int64_t> sizes;
  std::vector<int32_t> dtypes;

  // Takes `count` operands, from the one at `first` on.
  Tensors(const ffi::RemainingArgs& args, size_t first, size_t count) {
    for (size_t t = 0; t < count; ++t) {
      const ffi::AnyBuffer grad = *args.get<ffi::AnyBuffer>(first + t);
      grads.push_back(grad.untyped_data());
      sizes.push_back(static_cast<int64_t>(grad.element_count()));
      dtypes.push_back(dtype_of(grad.element_type()));
    }
  }

  size_t count() const { return grads.size(); }

  // Null if the tensors are refused. `groups`: see fusedopt_new_plan().
  Plan plan(const std::string& rule, const int32_t* groups, int64_t num_groups,
            bool on_cuda = false) const {
    return Plan(fusedopt_new_plan(rule.c_str(), static_cast<int64_t>(count()), sizes.data(),
                                  dtypes.data(), groups, num_groups, on_cuda));
  }
};

// The parts of the states' buffers. The states of all tensors of one dtype lie in one buffer, in
// the order of the tensors.
class States {
 public:
  States(const ffi::RemainingRets& results, size_t first) : results_(results), next_(first) {}

  // The next part of the buffer of this dtype; a dtype that is new takes the next buffer.
  char* take(ffi::DataType type, size_t bytes) {
    for (Buffer& buffer : buffers_) {
      if (buffer.type == type) return advance(buffer, bytes);
    }
    buffers_.push_back(
        {type, static_cast<char*>((*results_.get<ffi::AnyBuffer>(next_++))->untyped_data())});
    return advance(buffers_.back(), bytes);
  }

  // Goes on with the buffers of another state.
  void begin_state() { buffers_.clear(); }

 private:
  struct Buffer {
    ffi::DataType type;
    char* at;
  };
  static char* advance(Buffer& buffer, size_t bytes) {
    char* const at = buffer.at;
    buffer.at += bytes;
    return at;
  }

  const ffi::RemainingRets& results_;
  size_t next_;
  std::vector<Buffer> buffers_;
};

}  // namespace fusedopt
