#include "torch/step.h"

#include <ATen/ops/where.h>

#include <algorithm>

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
  for (DenseParam& it : partition.dense_params) {
    if (partition.grads[it.index] == nullptr) continue;
    const auto param = c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(it.param);
    it.original = at::Tensor::wrap_tensor_impl(param).detach();
    it.dense.copy_(it.original);
  }
}

void store_dense_params(Partition& partition) {
  for (DenseParam& it : partition.dense_params) {
    if (partition.grads[it.index] == nullptr) continue;
    it.original.copy_(it.dense);
    it.original.reset();
  }
}

}  // namespace

void step(const RuleInfo& rule, std::vector<Partition>& partitions, const StepRequest& request,
          Owners owners) {
  if (partitions.empty()) return;
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
  run(rule, partitions, passes, Phases::kBoth, owners);
  if (gathers) gather_clip_states(partitions, *request.clip, before);
  for (Partition& partition : partitions) {
    store_dense_params(partition);
    partition.dense_grads.clear();
    partition.clip_state.reset();
  }
}

}  // namespace fusedopt
