// JAX's custom call: one step over the buffers of a compiled program, in place.
#include <xla/ffi/api/ffi.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "c/fusedopt.h"

namespace {

namespace ffi = xla::ffi;

// The order of the operands and results. All results but the norm lie in the memory of operands.
enum Operand : size_t { kLr, kCount, kSkips, kTensors };  // then gradients, parameters, states
enum Result : size_t { kGradNorm, kNewCount, kNewSkips, kNewTensors };  // then parameters, states

int32_t dtype_of(ffi::DataType type) {
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

ffi::Error failure() { return ffi::Error(ffi::ErrorCode::kInvalidArgument, fusedopt_error()); }

struct FreePlan {
  void operator()(fusedopt_plan* plan) const { fusedopt_free_plan(plan); }
};

// The parts of the states' buffers. The states of all tensors of one dtype lie in one buffer, in
// the order of the tensors.
class States {
 public:
  States(ffi::RemainingRets& results, size_t first) : results_(results), next_(first) {}

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

  ffi::RemainingRets& results_;
  size_t next_;
  std::vector<Buffer> buffers_;
};

ffi::Error take_step(std::string_view rule_name, ffi::Span<const double> numbers,
                     ffi::Span<const int32_t> groups, int64_t num_groups, int64_t num_states,
                     int64_t states_used, bool traced_lr, double max_grad_norm, bool skip_nonfinite,
                     ffi::RemainingArgs args, ffi::RemainingRets results) {
  const std::string rule(rule_name);
  const size_t num_tensors = groups.size(), per_tensor = 1 + num_states + 1;
  std::vector<double> options(numbers.begin(), numbers.end());
  if (traced_lr) {  // the learning rate is the first number of every rule
    const double lr = *args.get<ffi::AnyBuffer>(kLr)->typed_data<float>();
    for (int64_t g = 0; g < num_groups; ++g) options[g * options.size() / num_groups] = lr;
  }
  int32_t& count = *(*results.get<ffi::AnyBuffer>(kNewCount))->typed_data<int32_t>();
  int32_t& skips = *(*results.get<ffi::AnyBuffer>(kNewSkips))->typed_data<int32_t>();
  std::vector<float> counts(num_tensors, static_cast<float>(count));

  std::vector<int64_t> sizes;
  std::vector<int32_t> dtypes;
  std::vector<const void*> grads;
  std::vector<void*> arrays(num_tensors * per_tensor);
  for (size_t t = 0; t < num_tensors; ++t) {
    ffi::AnyBuffer param = **results.get<ffi::AnyBuffer>(kNewTensors + t);
    sizes.push_back(static_cast<int64_t>(param.element_count()));
    dtypes.push_back(dtype_of(param.element_type()));
    grads.push_back(args.get<ffi::AnyBuffer>(kTensors + t)->untyped_data());
    arrays[t * per_tensor] = param.untyped_data();
    arrays[t * per_tensor + per_tensor - 1] = &counts[t];
  }
  States states(results, kNewTensors + num_tensors);
  for (int64_t k = 0; k < num_states; ++k) {
    if ((states_used >> k & 1) == 0) continue;
    states.begin_state();
    for (size_t t = 0; t < num_tensors; ++t) {
      ffi::AnyBuffer param = **results.get<ffi::AnyBuffer>(kNewTensors + t);
      arrays[t * per_tensor + 1 + k] = states.take(param.element_type(), param.size_bytes());
    }
  }

  const std::unique_ptr<fusedopt_plan, FreePlan> plan(
      fusedopt_new_plan(rule.c_str(), static_cast<int64_t>(num_tensors), sizes.data(),
                        dtypes.data(), groups.begin(), num_groups));
  if (plan == nullptr) return failure();
  fusedopt_control control{};
  fusedopt_step step{};
  step.arrays = arrays.data();
  step.grads = grads.data();
  step.options = options.data();
  step.max_grad_norm = max_grad_norm;
  step.measure = skip_nonfinite || std::isfinite(max_grad_norm);
  step.skip_nonfinite = skip_nonfinite;
  step.control = &control;
  if (fusedopt_take_step(plan.get(), &step) != 0) return failure();
  *(*results.get<ffi::AnyBuffer>(kGradNorm))->typed_data<float>() =
      static_cast<float>(control.grad_norm);
  control.step_skipped != 0 ? ++skips : ++count;
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fusedopt_jax_step, take_step,
                              ffi::Ffi::Bind()
                                  .Attr<std::string_view>("rule")
                                  .Attr<ffi::Span<const double>>("options")
                                  .Attr<ffi::Span<const int32_t>>("groups")
                                  .Attr<int64_t>("num_groups")
                                  .Attr<int64_t>("num_states")
                                  .Attr<int64_t>("states_used")
                                  .Attr<bool>("traced_lr")
                                  .Attr<double>("max_grad_norm")
                                  .Attr<bool>("skip_nonfinite")
                                  .RemainingArgs()
                                  .RemainingRets());
