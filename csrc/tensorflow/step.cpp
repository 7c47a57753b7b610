// TensorFlow's op: one step over the buffers of resource variables, in place.
#include <tensorflow/core/framework/op.h>
#include <tensorflow/core/framework/op_kernel.h>
#include <tensorflow/core/framework/resource_mgr.h>
#include <tensorflow/core/framework/resource_var.h>
#include <tensorflow/core/framework/shape_inference.h>
#include <tensorflow/core/platform/mutex.h>
#include <tensorflow/core/platform/threadpool.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "c/fusedopt.h"

namespace {

namespace tf = tensorflow;
using tf::errors::InvalidArgument;
using Variable = tf::core::RefCountPtr<tf::Var>;
using Locks = std::vector<std::unique_lock<tf::mutex>>;

int32_t dtype_of(tf::DataType type) {
  switch (type) {
    case tf::DT_FLOAT:
      return FUSEDOPT_FLOAT32;
    case tf::DT_DOUBLE:
      return FUSEDOPT_FLOAT64;
    case tf::DT_BFLOAT16:
      return FUSEDOPT_BFLOAT16;
    case tf::DT_HALF:
      return FUSEDOPT_FLOAT16;
    default:
      return -1;
  }
}

// Which of the variables it is, in words.
std::string name_of(int index, int num_variables) {
  const int state = index / num_variables;
  if (state == 0) return "variables[" + std::to_string(index) + "]";
  return "states[" + std::to_string(index - num_variables) + "]";
}

tf::Status check_like(const std::string& name, const tf::Tensor& tensor, const tf::Tensor& like) {
  if (!tensor.IsInitialized()) {
    return tf::errors::FailedPrecondition(name, " is not initialized");
  }
  if (tensor.dtype() == like.dtype() && tensor.shape() == like.shape()) return tf::OkStatus();
  return InvalidArgument(name, " is ", tf::DataTypeString(tensor.dtype()), " of the shape ",
                         tensor.shape().DebugString(), "; expected ",
                         tf::DataTypeString(like.dtype()), " of the shape ",
                         like.shape().DebugString(), ", as its variable");
}

// Locks the mutexes of all variables in the order of their addresses, as TensorFlow's own ops do.
tf::Status lock(const std::vector<Variable>& variables, int num_variables, Locks& locks) {
  std::vector<int> order(variables.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  const auto mutex_of = [&](int i) { return variables[i]->mu(); };
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return std::less<>()(mutex_of(a), mutex_of(b)); });
  for (size_t i = 1; i < order.size(); ++i) {
    if (mutex_of(order[i - 1]) == mutex_of(order[i])) {
      return InvalidArgument(name_of(order[i - 1], num_variables), " and ",
                             name_of(order[i], num_variables),
                             " are one variable; expected different ones");
    }
  }
  locks.reserve(order.size());
  for (int i : order) locks.emplace_back(*mutex_of(i));
  return tf::OkStatus();
}

// The variable's buffer. It gets one of its own if a read still uses the present one.
tf::Status writable(tf::OpKernelContext* context, tf::Var& variable, void*& data) {
  tf::Tensor& tensor = *variable.tensor();
  if (tensor.NumElements() > 0 && (!tensor.RefCountIsOne() || variable.copy_on_read_mode.load())) {
    tf::Tensor copy;
    TF_RETURN_IF_ERROR(context->allocate_temp(tensor.dtype(), tensor.shape(), &copy));
    std::memcpy(copy.data(), tensor.data(), tensor.TotalBytes());
    tensor = copy;
  }
  data = tensor.data();
  return tf::OkStatus();
}

struct FreePlan {
  void operator()(fusedopt_plan* plan) const { fusedopt_free_plan(plan); }
};

// Lends the threads that TensorFlow has for work within ops.
void lend(const tf::DeviceBase::CpuWorkerThreads& threads, fusedopt_step& step) {
  step.threads = threads.num_threads;
  step.pool = {threads.workers, [](void* pool, void (*task)(void*), void* argument) {
                 static_cast<tf::thread::ThreadPool*>(pool)->Schedule([=] { task(argument); });
               }};
}

class StepOp : public tf::OpKernel {
 public:
  explicit StepOp(tf::OpKernelConstruction* construction) : OpKernel(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("rule", &rule_));
    OP_REQUIRES_OK(construction, construction->GetAttr("groups", &groups_));
    OP_REQUIRES_OK(construction, construction->GetAttr("states_used", &states_used_));
    OP_REQUIRES_OK(construction, construction->GetAttr("measure", &measure_));
    OP_REQUIRES_OK(construction, construction->GetAttr("skip_nonfinite", &skip_nonfinite_));
    num_groups_ = 1 + *std::max_element(groups_.begin(), groups_.end());
    const auto length_of = [&](const char* list) {
      int first = 0, last = 0;
      return InputRange(list, &first, &last).ok() ? last - first : -1;
    };
    const auto used = std::count(states_used_.begin(), states_used_.end(), true);
    const int number = num_variables();
    OP_REQUIRES(construction,
                length_of("variables") == number && length_of("grads") == number &&
                    length_of("states") == number * used,
                InvalidArgument("there are ", length_of("variables"), " variables, ",
                                length_of("states"), " states and ", length_of("grads"),
                                " gradients; expected ", number, ", ", number * used, " and ",
                                number, ": a group, a gradient and each used state per variable"));
  }

  void Compute(tf::OpKernelContext* context) override {
    const tf::mutex_lock lock(mutex_);  // steps of one plan must not overlap
    OP_REQUIRES_OK(context, step(context));
  }

 private:
  struct Arrays {
    std::vector<float> scalars;    // of each variable
    std::vector<void*> addresses;  // per variable: itself, its states, its scalars
  };

  tf::Status step(tf::OpKernelContext* context);
  tf::Status find(tf::OpKernelContext* context, std::vector<Variable>& variables) const;
  tf::Status check(const std::vector<Variable>& variables, const tf::OpInputList& grads) const;
  tf::Status make_plan(const std::vector<Variable>& variables);
  tf::Status place(tf::OpKernelContext* context, const std::vector<Variable>& variables,
                   const tf::Tensor& scalars, Arrays& found) const;
  tf::Status numbers_of(const tf::Tensor& options, double lr, std::vector<double>& numbers) const;
  tf::Status call(tf::OpKernelContext* context, const std::vector<Variable>& variables,
                  const tf::OpInputList& grads, fusedopt_control& control);

  int num_variables() const { return static_cast<int>(groups_.size()); }

  std::string rule_;
  std::vector<tf::int32> groups_;
  int64_t num_groups_;
  std::vector<bool> states_used_;
  bool measure_, skip_nonfinite_;

  tf::mutex mutex_;
  std::vector<int64_t> sizes_;
  std::vector<int32_t> dtypes_;
  std::unique_ptr<fusedopt_plan, FreePlan> plan_;
};

// All variables, and then their states.
tf::Status StepOp::find(tf::OpKernelContext* context, std::vector<Variable>& variables) const {
  for (const char* list : {"variables", "states"}) {
    tf::OpInputList handles;
    TF_RETURN_IF_ERROR(context->input_list(list, &handles));
    for (int i = 0; i < handles.size(); ++i) {
      const tf::ResourceHandle& handle = handles[i].scalar<tf::ResourceHandle>()();
      Variable variable;
      TF_RETURN_IF_ERROR(tf::LookupResource(context, handle, &variable));
      variables.push_back(std::move(variable));
    }
  }
  return tf::OkStatus();
}

tf::Status StepOp::check(const std::vector<Variable>& variables,
                         const tf::OpInputList& grads) const {
  for (int i = 0; i < static_cast<int>(variables.size()); ++i) {
    const tf::Tensor& tensor = *variables[i]->tensor();
    const tf::Tensor& like = *variables[i % num_variables()]->tensor();
    TF_RETURN_IF_ERROR(check_like(name_of(i, num_variables()), tensor, like));
    if (dtype_of(like.dtype()) < 0) {
      return InvalidArgument(name_of(i, num_variables()), " is ", tf::DataTypeString(like.dtype()),
                             "; expected float, double, bfloat16 or half");
    }
  }
  for (int i = 0; i < num_variables(); ++i) {
    const std::string name = "grads[" + std::to_string(i) + "]";
    TF_RETURN_IF_ERROR(check_like(name, grads[i], *variables[i]->tensor()));
  }
  return tf::OkStatus();
}

// Lays the variables out anew if their sizes or formats are others than in the last step.
tf::Status StepOp::make_plan(const std::vector<Variable>& variables) {
  std::vector<int64_t> sizes;
  std::vector<int32_t> dtypes;
  for (int i = 0; i < num_variables(); ++i) {
    sizes.push_back(variables[i]->tensor()->NumElements());
    dtypes.push_back(dtype_of(variables[i]->tensor()->dtype()));
  }
  if (plan_ != nullptr && sizes == sizes_ && dtypes == dtypes_) return tf::OkStatus();
  plan_.reset(fusedopt_new_plan(rule_.c_str(), num_variables(), sizes.data(), dtypes.data(),
                                groups_.data(), num_groups_, /*on_cuda=*/0));
  if (plan_ == nullptr) return InvalidArgument(fusedopt_error());
  sizes_ = sizes;
  dtypes_ = dtypes;
  return tf::OkStatus();
}

tf::Status StepOp::step(tf::OpKernelContext* context) {
  tf::OpInputList grads;
  TF_RETURN_IF_ERROR(context->input_list("grads", &grads));
  std::vector<Variable> variables;
  TF_RETURN_IF_ERROR(find(context, variables));

  Locks locks;
  TF_RETURN_IF_ERROR(lock(variables, num_variables(), locks));
  TF_RETURN_IF_ERROR(check(variables, grads));
  TF_RETURN_IF_ERROR(make_plan(variables));
  fusedopt_control control{};
  TF_RETURN_IF_ERROR(call(context, variables, grads, control));

  tf::Tensor *grad_norm = nullptr, *skipped = nullptr;
  TF_RETURN_IF_ERROR(context->allocate_output("grad_norm", {}, &grad_norm));
  TF_RETURN_IF_ERROR(context->allocate_output("skipped", {}, &skipped));
  grad_norm->scalar<float>()() = static_cast<float>(control.grad_norm);
  skipped->scalar<bool>()() = control.step_skipped != 0;
  return tf::OkStatus();
}

// Finds the arrays of all variables in the order of the kernels. All share the rule's scalars.
tf::Status StepOp::place(tf::OpKernelContext* context, const std::vector<Variable>& variables,
                         const tf::Tensor& scalars, Arrays& found) const {
  const int64_t num_scalars = scalars.NumElements();
  found.scalars.reserve(num_variables() * num_scalars);  // their addresses stay
  for (int i = 0; i < num_variables(); ++i) {
    found.addresses.push_back(nullptr);
    TF_RETURN_IF_ERROR(writable(context, *variables[i], found.addresses.back()));
    int state = num_variables() + i;
    for (const bool used : states_used_) {
      found.addresses.push_back(nullptr);
      if (!used) continue;
      TF_RETURN_IF_ERROR(writable(context, *variables[state], found.addresses.back()));
      state += num_variables();
    }
    for (int64_t k = 0; k < num_scalars; ++k) {
      found.scalars.push_back(scalars.flat<float>()(k));
      found.addresses.push_back(&found.scalars.back());
    }
  }
  return tf::OkStatus();
}

// The options of all groups, with this learning rate, which is the first number of every rule.
tf::Status StepOp::numbers_of(const tf::Tensor& options, double lr,
                              std::vector<double>& numbers) const {
  if (options.dim_size(0) < num_groups_) {
    return InvalidArgument("options has ", options.dim_size(0), " rows; expected ", num_groups_,
                           ", one for each group");
  }
  const double* const first = options.flat<double>().data();
  numbers.assign(first, first + options.NumElements());
  for (int64_t g = 0; g < num_groups_; ++g) numbers[g * options.dim_size(1)] = lr;
  return tf::OkStatus();
}

tf::Status StepOp::call(tf::OpKernelContext* context, const std::vector<Variable>& variables,
                        const tf::OpInputList& grads, fusedopt_control& control) {
  const tf::Tensor *lr, *options, *scalars, *limit, *scale;
  TF_RETURN_IF_ERROR(context->input("lr", &lr));
  TF_RETURN_IF_ERROR(context->input("options", &options));
  TF_RETURN_IF_ERROR(context->input("scalars", &scalars));
  TF_RETURN_IF_ERROR(context->input("max_grad_norm", &limit));
  TF_RETURN_IF_ERROR(context->input("grad_scale", &scale));
  std::vector<double> numbers;
  TF_RETURN_IF_ERROR(numbers_of(*options, lr->scalar<double>()(), numbers));
  Arrays arrays;
  TF_RETURN_IF_ERROR(place(context, variables, *scalars, arrays));
  std::vector<const void*> gradients;
  for (int i = 0; i < num_variables(); ++i) gradients.push_back(grads[i].data());

  fusedopt_step step{};
  step.arrays = arrays.addresses.data();
  step.grads = gradients.data();
  step.options = numbers.data();
  step.max_grad_norm = limit->scalar<double>()();
  step.measure = measure_;
  step.skip_nonfinite = skip_nonfinite_;
  step.grad_scale = scale->NumElements() > 0 ? scale->flat<float>().data() : nullptr;
  step.control = &control;
  lend(*context->device()->tensorflow_cpu_worker_threads(), step);
  if (fusedopt_take_step(plan_.get(), &step) != 0) return InvalidArgument(fusedopt_error());

  tf::Tensor* left = nullptr;
  TF_RETURN_IF_ERROR(context->allocate_output("new_scalars", scalars->shape(), &left));
  std::copy_n(arrays.scalars.begin(), scalars->NumElements(), left->flat<float>().data());
  return tf::OkStatus();
}

tf::Status infer_shapes(tf::shape_inference::InferenceContext* context) {
  using Shapes = std::vector<tf::shape_inference::ShapeHandle>;
  const std::pair<const char*, int> ranks[] = {
      {"lr", 0}, {"options", 2}, {"scalars", 1}, {"max_grad_norm", 0}, {"grad_scale", 1}};
  Shapes scalars;
  for (const auto& [name, rank] : ranks) {
    Shapes shapes;
    TF_RETURN_IF_ERROR(context->input(name, &shapes));
    TF_RETURN_IF_ERROR(context->WithRank(shapes[0], rank, &shapes[0]));
    if (name == std::string("scalars")) scalars = shapes;
  }
  TF_RETURN_IF_ERROR(context->set_output("grad_norm", {context->Scalar()}));
  TF_RETURN_IF_ERROR(context->set_output("skipped", {context->Scalar()}));
  return context->set_output("new_scalars", scalars);
}

}  // namespace

REGISTER_OP("FusedoptStep")
    .Doc(R"(Takes one step over variables of the CPU, in place, or skips it.

rule, options: a rule of the kernels, and a row for each group: the numbers of all its options.
lr: replaces the first number of each row.
groups: the group of each variable.
states_used: for each state of the rule, whether the options use it.
states: of each used state, the variables of all variables.
scalars: the rule's scalars before the step, which all variables share.
max_grad_norm: infinity if gradients are never clipped.
grad_scale: empty, or the factor that the loss was multiplied by.
)")
    .Attr("rule: string")
    .Attr("groups: list(int) >= 1")
    .Attr("states_used: list(bool)")
    .Attr("measure: bool")
    .Attr("skip_nonfinite: bool")
    .Attr("num_variables: int >= 1")
    .Attr("num_states: int >= 0")
    .Attr("T: list({float, double, bfloat16, half}) >= 1")
    .Input("variables: num_variables * resource")
    .Input("states: num_states * resource")
    .Input("grads: T")
    .Input("lr: double")
    .Input("options: double")
    .Input("scalars: float")
    .Input("max_grad_norm: double")
    .Input("grad_scale: float")
    .Output("grad_norm: float")
    .Output("skipped: bool")
    .Output("new_scalars: float")
    .SetIsStateful()
    .SetShapeFn(infer_shapes);

REGISTER_KERNEL_BUILDER(Name("FusedoptStep").Device(tf::DEVICE_CPU), StepOp);
