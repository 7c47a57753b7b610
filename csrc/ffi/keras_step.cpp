// The custom call of Keras's JAX backend: one step, in place. Every state of every variable has an
// array of its own, the rule's scalars are arrays that all variables share, and the gradients may
// be those of a scaled loss. Several calls may share a step: each of them takes some of the
// variables, and all take the total of fusedopt_jax_measure over all gradients.
#include <string_view>

#include "ffi/message.h"
#include "ffi/tensors.h"

namespace {

using namespace fusedopt;

// The order of the operands and results. All results but the norm lie in the memory of operands.
// There is a total if it has any elements.
enum Operand : size_t {
  kLr,
  kScale,
  kTotal,
  kCount,
  kSkips,
  kScalars
};  // scalars, gradients, parameters, states
enum Result : size_t {
  kGradNorm,
  kNewCount,
  kNewSkips,
  kNewScalars
};  // scalars, parameters, states

template <class T>
T& number(const ffi::RemainingRets& results, size_t index) {
  return *(*results.get<ffi::AnyBuffer>(index))->typed_data<T>();
}

// One copy of the scalars for each tensor: the first is how many steps there were.
class Scalars {
 public:
  Scalars(const ffi::RemainingRets& results, size_t num_shared, size_t num_tensors)
      : results_(results), num_(1 + num_shared) {
    for (size_t t = 0; t < num_tensors; ++t) {
      values_.push_back(static_cast<float>(number<int32_t>(results, kNewCount)));
      for (size_t k = 0; k < num_shared; ++k) {
        values_.push_back(number<float>(results, kNewScalars + k));
      }
    }
  }

  size_t num() const { return num_; }
  float* of(size_t tensor) { return values_.data() + tensor * num_; }

  // Writes what the step left.
  void keep() {
    for (size_t k = 1; k < num_; ++k) number<float>(results_, kNewScalars + k - 1) = values_[k];
  }

 private:
  const ffi::RemainingRets& results_;
  size_t num_;
  std::vector<float> values_;
};

// The addresses of a step's arrays.
std::vector<void*> addresses(const ffi::RemainingRets& results, size_t num_tensors,
                             size_t num_states, int64_t states_used, Scalars& scalars) {
  const size_t per_tensor = 1 + num_states + scalars.num();
  std::vector<void*> arrays(num_tensors * per_tensor);
  size_t next = kNewScalars + scalars.num() - 1;
  for (size_t k = 0; k <= num_states; ++k) {
    if (k > 0 && (states_used >> (k - 1) & 1) == 0) continue;
    for (size_t t = 0; t < num_tensors; ++t) {
      arrays[t * per_tensor + k] = (*results.get<ffi::AnyBuffer>(next++))->untyped_data();
    }
  }
  for (size_t t = 0; t < num_tensors; ++t) {
    for (size_t k = 0; k < scalars.num(); ++k) {
      arrays[t * per_tensor + 1 + num_states + k] = scalars.of(t) + k;
    }
  }
  return arrays;
}

ffi::Error take_step(ffi::ThreadPool threads, std::string_view rule,
                     ffi::Span<const double> constants, ffi::Span<const int32_t> groups,
                     int64_t num_groups, int64_t num_states, int64_t num_scalars,
                     int64_t states_used, double max_grad_norm, bool skip_nonfinite, bool is_scaled,
                     ffi::RemainingArgs args, ffi::RemainingRets results) {
  const Tensors tensors(args, kScalars + num_scalars, groups.size());
  std::vector<double> options(constants.begin(), constants.end());
  for (int64_t g = 0; g < num_groups; ++g) {  // the learning rate is the first number of every rule
    options[g * options.size() / num_groups] = *args.get<ffi::AnyBuffer>(kLr)->typed_data<float>();
  }
  Scalars scalars(results, num_scalars, tensors.count());
  const std::vector<void*> arrays =
      addresses(results, tensors.count(), num_states, states_used, scalars);
  const Plan plan = tensors.plan(std::string(rule), groups.begin(), num_groups);
  if (plan == nullptr) return failure(fusedopt_error());

  const OptionalMessage total(*args.get<ffi::AnyBuffer>(kTotal));
  fusedopt_control control{};
  fusedopt_step step =
      step_of(arrays.data(), tensors.grads.data(), options.data(), max_grad_norm, skip_nonfinite);
  step.grad_scale = is_scaled ? args.get<ffi::AnyBuffer>(kScale)->typed_data<float>() : nullptr;
  step.total = total.data();
  step.control = &control;
  lend(threads, step);
  if (fusedopt_take_step(plan.get(), &step) != 0) return failure(fusedopt_error());
  number<float>(results, kGradNorm) = static_cast<float>(control.grad_norm);
  if (control.step_skipped != 0) {
    ++number<int32_t>(results, kNewSkips);
  } else {
    ++number<int32_t>(results, kNewCount);
    scalars.keep();
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedopt_keras_step, take_step,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("rule")
                                  .Attr<ffi::Span<const double>>("constants")
                                  .Attr<ffi::Span<const int32_t>>("groups")
                                  .Attr<int64_t>("num_groups")
                                  .Attr<int64_t>("num_states")
                                  .Attr<int64_t>("num_scalars")
                                  .Attr<int64_t>("states_used")
                                  .Attr<double>("max_grad_norm")
                                  .Attr<bool>("skip_nonfinite")
                                  .Attr<bool>("is_scaled")
                                  .RemainingArgs()
                                  .RemainingRets());
