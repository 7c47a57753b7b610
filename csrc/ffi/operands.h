// The operands and results of a step in JAX's compiled programs.
#pragma once

#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ffi/tensors.h"

namespace fusedopt {

// Their order. All results but the norm lie in the memory of operands. There is a total over ranks
// if it has any elements. After the first gradient come the others, parameters and states.
enum Operand : size_t { kNumbers, kTotal, kCount, kSkips, kTensors };
enum Result : size_t { kGradNorm, kNewCount, kNewSkips, kNewTensors };  // then parameters, states

// The arguments of a handler that Python passes: fusedopt/jax/step.py.
template <class Binding>
auto with_attributes(Binding context) {
  return std::move(context)
      .template Attr<std::string_view>("rule")
      .template Attr<ffi::Span<const double>>("constants")
      .template Attr<ffi::Span<const int32_t>>("places")
      .template Attr<ffi::Span<const int32_t>>("factors")
      .template Attr<ffi::Span<const int32_t>>("groups")
      .template Attr<int64_t>("num_groups")
      .template Attr<int64_t>("num_states")
      .template Attr<int64_t>("states_used")
      .template Attr<bool>("skip_nonfinite")
      .RemainingArgs()
      .RemainingRets();
}

inline ffi::AnyBuffer buffer(const ffi::RemainingRets& results, size_t index) {
  return **results.get<ffi::AnyBuffer>(index);
}

// The addresses of a step's arrays.
class Arrays {
 public:
  Arrays(size_t num_tensors, size_t num_states, size_t num_scalars)
      : num_tensors_(num_tensors),
        num_states_(num_states),
        per_tensor_(1 + num_states + num_scalars),
        addresses_(num_tensors * per_tensor_) {}

  // Finds parameters, and then states, in the results from the one at `first` on.
  void find(const ffi::RemainingRets& results, size_t first, int64_t states_used) {
    for (size_t t = 0; t < num_tensors_; ++t) {
      addresses_[t * per_tensor_] = buffer(results, first + t).untyped_data();
    }
    States states(results, first + num_tensors_);
    for (int64_t k = 0; states_used >> k != 0; ++k) {
      if ((states_used >> k & 1) == 0) continue;
      states.begin_state();
      for (size_t t = 0; t < num_tensors_; ++t) {
        const ffi::AnyBuffer param = buffer(results, first + t);
        addresses_[t * per_tensor_ + 1 + k] = states.take(param.element_type(), param.size_bytes());
      }
    }
  }

  // Gives every tensor the next of these scalars, which must live as long as the step.
  void set_scalars(float* values) {
    for (size_t t = 0; t < num_tensors_; ++t) {
      for (size_t k = 1 + num_states_; k < per_tensor_; ++k) {
        addresses_[t * per_tensor_ + k] = values++;
      }
    }
  }

  void* const* data() const { return addresses_.data(); }

 private:
  size_t num_tensors_, num_states_, per_tensor_;
  std::vector<void*> addresses_;
};

// Empty if the limit may be this number.
inline std::string bad_limit(double number) {
  if (number > 0) return {};
  std::ostringstream text;
  text << "Invalid max_grad_norm value: " << number << "; expected a number > 0";
  return text.str();
}

}  // namespace fusedopt
