// JAX's custom calls: one step over the buffers of a compiled program, in place. Over several
// ranks, each of them measures first, and the program adds up their messages.
#include <cmath>
#include <sstream>
#include <string_view>

#include "ffi/message.h"
#include "ffi/tensors.h"

namespace {

using namespace fusedopt;

// The order of the operands and results. All results but the norm lie in the memory of operands.
// There is a total over ranks if it has any elements. After the first gradient come the others,
// parameters and states.
enum Operand : size_t { kNumbers, kTotal, kCount, kSkips, kTensors };
enum Result : size_t { kGradNorm, kNewCount, kNewSkips, kNewTensors };  // then parameters, states

ffi::AnyBuffer buffer(const ffi::RemainingRets& results, size_t index) {
  return **results.get<ffi::AnyBuffer>(index);
}

// The numbers of the options of all groups, and then the limit. Some are constants of the program,
// the others are an operand.
std::vector<double> numbers_of(ffi::Span<const double> constants, ffi::Span<const int32_t> places,
                               const ffi::RemainingArgs& args) {
  std::vector<double> numbers(constants.begin(), constants.end());
  const float* next = args.get<ffi::AnyBuffer>(kNumbers)->typed_data<float>();
  for (const int32_t place : places) numbers[place] = *next++;
  return numbers;
}

// 1 after `count` multiplications by `factor` in float32. Below 2^-64 it may be anything: rules
// subtract it from 1 in float64.
float product_after(int32_t count, float factor) {
  float product = 1;
  for (int32_t i = 0; i < count && product > 0x1p-64f; ++i) product *= factor;
  return product;
}

// The scalars of a tensor before this step: how many steps there were, and products that every
// step multiplied by one of the numbers.
std::vector<float> scalars_of(int32_t count, ffi::Span<const int32_t> factors,
                              const std::vector<double>& numbers) {
  std::vector<float> scalars{static_cast<float>(count)};
  for (const int32_t place : factors) {
    scalars.push_back(product_after(count, static_cast<float>(numbers[place])));
  }
  return scalars;
}

// The addresses of a step's arrays, and the memory of its scalars.
class Arrays {
 public:
  Arrays(size_t num_tensors, size_t num_states, const std::vector<float>& scalars)
      : num_tensors_(num_tensors),
        per_tensor_(1 + num_states + scalars.size()),
        addresses_(num_tensors * per_tensor_) {
    for (size_t t = 0; t < num_tensors; ++t) {
      scalars_.insert(scalars_.end(), scalars.begin(), scalars.end());
    }
    for (size_t i = 0; i < scalars_.size(); ++i) {
      const size_t t = i / scalars.size(), k = i % scalars.size();
      addresses_[t * per_tensor_ + 1 + num_states + k] = &scalars_[i];
    }
  }

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

  void* const* data() const { return addresses_.data(); }

 private:
  size_t num_tensors_, per_tensor_;
  std::vector<void*> addresses_;
  std::vector<float> scalars_;
};

std::string bad_limit(double number) {
  std::ostringstream text;
  text << "Invalid max_grad_norm value: " << number << "; expected a number > 0";
  return text.str();
}

ffi::Error take_step(ffi::ThreadPool threads, std::string_view rule,
                     ffi::Span<const double> constants, ffi::Span<const int32_t> places,
                     ffi::Span<const int32_t> factors, ffi::Span<const int32_t> groups,
                     int64_t num_groups, int64_t num_states, int64_t states_used,
                     bool skip_nonfinite, ffi::RemainingArgs args, ffi::RemainingRets results) {
  const std::vector<double> numbers = numbers_of(constants, places, args);
  int32_t& count = *buffer(results, kNewCount).typed_data<int32_t>();
  int32_t& skips = *buffer(results, kNewSkips).typed_data<int32_t>();
  const Tensors tensors(args, kTensors, groups.size());
  Arrays arrays(tensors.count(), num_states, scalars_of(count, factors, numbers));
  arrays.find(results, kNewTensors, states_used);
  if (!(numbers.back() > 0)) return failure(bad_limit(numbers.back()));
  const Plan plan = tensors.plan(std::string(rule), groups.begin(), num_groups);
  if (plan == nullptr) return failure(fusedopt_error());

  const OptionalMessage total(*args.get<ffi::AnyBuffer>(kTotal));
  fusedopt_control control{};
  fusedopt_step step{};
  step.arrays = arrays.data();
  step.grads = tensors.grads.data();
  step.options = numbers.data();
  step.max_grad_norm = numbers.back();
  step.measure = skip_nonfinite || std::isfinite(step.max_grad_norm);
  step.skip_nonfinite = skip_nonfinite;
  step.total = total.data();
  step.control = &control;
  lend(threads, step);
  if (fusedopt_take_step(plan.get(), &step) != 0) return failure(fusedopt_error());
  *buffer(results, kGradNorm).typed_data<float>() = static_cast<float>(control.grad_norm);
  control.step_skipped != 0 ? ++skips : ++count;
  return ffi::Error::Success();
}

// Operands: per gradient, whether this rank counts it; and the gradients.
ffi::Error measure(ffi::ThreadPool threads, std::string_view rule, ffi::RemainingArgs args,
                   ffi::RemainingRets results) {
  const Tensors tensors(args, 1, args.size() - 1);
  const Plan plan = tensors.plan(std::string(rule), nullptr, 1);
  if (plan == nullptr) return failure(fusedopt_error());
  fusedopt_step step{};
  step.grads = tensors.grads.data();
  lend(threads, step);
  const auto* counted = static_cast<const uint8_t*>(args.get<ffi::AnyBuffer>(0)->untyped_data());
  Message message;
  if (fusedopt_measure(plan.get(), &step, counted, message.data()) != 0) {
    return failure(fusedopt_error());
  }
  split(message, buffer(results, 0).typed_data<int32_t>());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedopt_jax_measure, measure,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("rule")
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedopt_jax_step, take_step,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("rule")
                                  .Attr<ffi::Span<const double>>("constants")
                                  .Attr<ffi::Span<const int32_t>>("places")
                                  .Attr<ffi::Span<const int32_t>>("factors")
                                  .Attr<ffi::Span<const int32_t>>("groups")
                                  .Attr<int64_t>("num_groups")
                                  .Attr<int64_t>("num_states")
                                  .Attr<int64_t>("states_used")
                                  .Attr<bool>("skip_nonfinite")
                                  .RemainingArgs()
                                  .RemainingRets());
