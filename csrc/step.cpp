#include "step.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "run.h"

namespace fusedopt {

namespace {

// A 0-d float32 on the partition's device, kept alive by `owner`.
const float* scalar_on(const std::optional<at::Tensor>& scalar, c10::Device device,
                       std::vector<at::Tensor>& owner) {
  if (!scalar.has_value()) return nullptr;
  owner.push_back(scalar->to(device, at::kFloat));
  return owner.back().const_data_ptr<float>();
}

bool is_by_tensor(const AdaptiveClipRequest& clip) {
  return static_cast<ClipKind>(clip.kind) == ClipKind::kPerTensor;
}

// `is_first`: a limit's state lies on this device, as the first parameter does.
Pass make_pass(Partition& partition, bool is_first, const StepRequest& request,
               std::vector<at::Tensor>& owner) {
  Pass pass = partition.pass();
  pass.options.max_grad_norm = request.max_grad_norm;
  pass.options.skip_nonfinite = request.skip_nonfinite;
  pass.options.measure = request.measure;
  pass.options.grad_scale = scalar_on(request.grad_scale, partition.device, owner);
  pass.options.found_inf = scalar_on(request.found_inf, partition.device, owner);
  if (request.clip.has_value()) {
    const AdaptiveClipRequest& clip = *request.clip;
    pass.options.clip.kind = static_cast<ClipKind>(clip.kind);
    std::copy_n(clip.arguments.begin(), std::min<size_t>(clip.arguments.size(), kMaxClipArguments),
                pass.options.clip.arguments);
    owner.push_back(clip.state.to(partition.device, at::kDouble, false, /*copy=*/!is_first));
    pass.options.clip.state = owner.back().data_ptr<double>();
    partition.clip_state = owner.back();
    pass.learns = is_by_tensor(clip) || is_first;
    pass.own_clips = partition.clips_for(pass.options.clip.kind);
  }
  return pass;
}

// What the other devices have learned, each of its own tensors, in its own copy.
void gather_clip_states(const std::vector<Partition>& partitions, const AdaptiveClipRequest& clip,
                        const at::Tensor& before) {
  at::Tensor state = clip.state;
  for (size_t i = 1; i < partitions.size(); ++i) {
    const at::Tensor now = partitions[i].clip_state.to(state.device());
    state.copy_(at::where(now.ne(before), now, state));
  }
}

// Parameters with gaps between their elements: the kernels see a dense copy.
void load_dense_params(Partition& partition) {
  for (const DenseParam& it : partition.dense_params) {
    if (partition.grads[it.index] != nullptr) {
      it.dense.copy_(THPVariable_Unpack(it.param).detach());
    }
  }
}

void store_dense_params(Partition& partition) {
  for (const DenseParam& it : partition.dense_params) {
    if (partition.grads[it.index] != nullptr) {
      THPVariable_Unpack(it.param).detach().copy_(it.dense);
    }
  }
}

}  // namespace

bool step(Plan& plan, const py::list& param_groups, const py::dict& state,
          const StepRequest& request) {
  const at::NoGradGuard no_grad;
  if (!plan.refresh(param_groups, state)) return false;
  std::vector<Partition>& partitions = plan.partitions();
  if (partitions.empty()) return true;
  partitions[0].control = request.control;

  std::vector<at::Tensor> owner;
  std::vector<Pass> passes;
  for (Partition& partition : partitions) {
    load_dense_params(partition);
    passes.push_back(make_pass(partition, passes.empty(), request, owner));
  }
  if (partitions.size() > 1 && partitions[0].step_ring.defined()) {
    // What a step's own row says of all devices has to be known before the update writes it.
    for (Pass& pass : passes) pass.options.measure = true;
  }
  const bool gathers = passes.size() > 1 && request.clip.has_value() && is_by_tensor(*request.clip);
  const at::Tensor before = gathers ? request.clip->state.clone() : at::Tensor();
  run(plan.rule(), partitions, passes, Phases::kBoth, [&] { return plan.memory_in_use(); });
  if (gathers) gather_clip_states(partitions, *request.clip, before);
  for (Partition& partition : partitions) {
    store_dense_params(partition);
    partition.dense_grads.clear();
    partition.clip_state.reset();
  }
  return true;
}

}  // namespace fusedopt
