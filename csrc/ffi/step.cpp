// JAX's custom calls: one step over the buffers of a compiled program, in place. Over several
// ranks, each of them measures first, and the program adds up their messages.
#include <string_view>

#include "ffi/message.h"
#include "ffi/operands.h"
#include "math/power.h"

namespace {

using namespace fusedopt;

// The numbers of the options of all groups, and then the limit. Some are constants of the program,
// the others are an operand.
std::vector<double> numbers_of(ffi::Span<const double> constants, ffi::Span<const int32_t> places,
                               const ffi::RemainingArgs& args) {
  std::vector<double> numbers(constants.begin(), constants.end());
  const float* next = args.get<ffi::AnyBuffer>(kNumbers)->typed_data<float>();
  for (const int32_t place : places) numbers[place] = *next++;
  return numbers;
}

// The scalars of all tensors before this step: how many steps there were, and products that every
// step multiplied by one of the numbers.
std::vector<float> scalars_of(int32_t count, ffi::Span<const int32_t> factors,
                              const std::vector<double>& numbers, size_t num_tensors) {
  std::vector<float> scalars{static_cast<float>(count)};
  for (const int32_t place : factors) {
    scalars.push_back(product_after(count, static_cast<float>(numbers[place])));
  }
  const size_t per_tensor = scalars.size();
  while (scalars.size() < num_tensors * per_tensor) {
    scalars.push_back(scalars[scalars.size() - per_tensor]);
  }
  return scalars;
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
  std::vector<float> scalars = scalars_of(count, factors, numbers, tensors.count());
  Arrays arrays(tensors.count(), num_states, 1 + factors.size());
  arrays.find(results, kNewTensors, states_used);
  arrays.set_scalars(scalars.data());
  if (const auto why = bad_limit(numbers.back()); !why.empty()) return failure(why);
  const Plan plan = tensors.plan(std::string(rule), groups.begin(), num_groups);
  if (plan == nullptr) return failure(fusedopt_error());

  const OptionalMessage total(*args.get<ffi::AnyBuffer>(kTotal));
  fusedopt_control control{};
  fusedopt_step step =
      step_of(arrays.data(), tensors.grads.data(), numbers.data(), numbers.back(), skip_nonfinite);
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
                              with_attributes(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
