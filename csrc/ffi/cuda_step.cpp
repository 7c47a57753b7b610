// JAX's custom call on a CUDA device: it enqueues one step over the buffers of a compiled program.
#include <string_view>

#include "ffi/operands.h"

namespace {

using namespace fusedopt;

// Where the learning rate of each group is on the device; null where it is a constant. Empty if
// another number is an array.
std::vector<const float*> lrs_of(ffi::Span<const double> constants, ffi::Span<const int32_t> places,
                                 int64_t num_groups, const ffi::RemainingArgs& args) {
  const float* next = args.get<ffi::AnyBuffer>(kNumbers)->typed_data<float>();
  const int64_t per_group = (static_cast<int64_t>(constants.size()) - 1) / num_groups;
  std::vector<const float*> lrs(num_groups);
  for (const int32_t place : places) {  // lr is the first number of every rule
    if (place % per_group != 0 || place / per_group >= num_groups) return {};
    lrs[place / per_group] = next++;
  }
  return lrs;
}

std::vector<float> factors_of(ffi::Span<const double> constants, ffi::Span<const int32_t> places) {
  std::vector<float> factors;
  for (const int32_t place : places) factors.push_back(static_cast<float>(constants[place]));
  return factors;
}

ffi::Error enqueue_step(void* stream, int32_t device, ffi::ScratchAllocator scratch,
                        std::string_view rule, ffi::Span<const double> constants,
                        ffi::Span<const int32_t> places, ffi::Span<const int32_t> factor_places,
                        ffi::Span<const int32_t> groups, int64_t num_groups, int64_t num_states,
                        int64_t states_used, bool skip_nonfinite, ffi::RemainingArgs args,
                        ffi::RemainingRets results) {
  const double limit = *(constants.end() - 1);
  if (const auto why = bad_limit(limit); !why.empty()) return failure(why);
  if (args.get<ffi::AnyBuffer>(kTotal)->element_count() > 0) {
    return failure("a step over ranks isn't there on GPUs");
  }
  const std::vector<const float*> lrs = lrs_of(constants, places, num_groups, args);
  if (lrs.empty()) {
    return failure("an option other than the learning rate is an array; expected a number on GPUs");
  }
  const std::vector<float> factors = factors_of(constants, factor_places);
  const Tensors tensors(args, kTensors, groups.size());
  const Plan plan = tensors.plan(std::string(rule), groups.begin(), num_groups, /*on_cuda=*/true);
  if (plan == nullptr) return failure(fusedopt_error());
  Arrays arrays(tensors.count(), num_states, 1 + factors.size());
  arrays.find(results, kNewTensors, states_used);
  const auto memory = scratch.Allocate(fusedopt_device_bytes(plan.get()), 16);
  if (!memory.has_value()) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the step's workspace");
  }

  const fusedopt_step step =
      step_of(arrays.data(), tensors.grads.data(), constants.begin(), limit, skip_nonfinite);
  fusedopt_cuda cuda{};
  cuda.device = device;
  cuda.stream = stream;
  cuda.memory = *memory;
  cuda.lr = lrs.data();
  cuda.factors = factors.data();
  cuda.count = buffer(results, kNewCount).typed_data<int32_t>();
  cuda.skips = buffer(results, kNewSkips).typed_data<int32_t>();
  cuda.grad_norm = buffer(results, kGradNorm).typed_data<float>();
  if (fusedopt_enqueue_step(plan.get(), &step, &cuda) != 0) return failure(fusedopt_error());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedopt_jax_cuda_step, enqueue_step,
                              with_attributes(ffi::Ffi::Bind()
                                                  .Ctx<ffi::PlatformStream<void*>>()
                                                  .Ctx<ffi::DeviceOrdinal>()
                                                  .Ctx<ffi::ScratchAllocator>()));
