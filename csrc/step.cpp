#include "step.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstddef>

#include "lifetimes.h"

namespace fusedopt {

namespace {

#if !defined(FUSEDOPT_CUDA_DEVICE)
#define FUSEDOPT_CUDA_DEVICE c10::kCUDA
#endif

// Under this many elements a thread costs more to wake than it saves.
constexpr int64_t kElementsPerThread = 32768;

// Above this many elements a step is long enough to let other Python threads run meanwhile.
constexpr int64_t kElementsToReleaseGil = 1 << 20;

int64_t num_elements(const Partition& partition) {
  int64_t count = 0;
  for (size_t t = 0; t < partition.tensors.size(); ++t) {
    if (partition.grads[t] != nullptr) count += partition.tensors[t].numel;
  }
  return count;
}

// A 0-d float32 on the partition's device, kept alive by `owner`.
const float* scalar_on(const std::optional<at::Tensor>& scalar, c10::Device device,
                       std::vector<at::Tensor>& owner) {
  if (!scalar.has_value()) return nullptr;
  owner.push_back(scalar->to(device, at::kFloat));
  return owner.back().const_data_ptr<float>();
}

Pass make_pass(Partition& partition, const StepRequest& request, std::vector<at::Tensor>& owner) {
  Pass pass{};
  pass.tensors = partition.tensors.data();
  pass.chunks = partition.chunks.data();
  pass.groups = partition.groups.data();
  pass.grads = partition.grads.data();
  pass.chunk_sums = partition.chunk_sums.data_ptr<double>();
  pass.control = static_cast<StepControl*>(partition.control.data_ptr());
  pass.num_tensors = static_cast<int64_t>(partition.tensors.size());
  pass.num_chunks = static_cast<int64_t>(partition.chunks.size());
  pass.num_groups = static_cast<int64_t>(partition.groups.size());
  pass.options.max_grad_norm = request.max_grad_norm;
  pass.options.skip_nonfinite = request.skip_nonfinite;
  pass.options.measure = request.measure;
  pass.options.grad_scale = scalar_on(request.grad_scale, partition.device, owner);
  pass.options.found_inf = scalar_on(request.found_inf, partition.device, owner);
  return pass;
}

void run_on_cpu(Plan& plan, Partition& partition, const Pass& pass, Phases phases) {
  const int64_t elements = num_elements(partition);
  const int64_t worthwhile = std::max<int64_t>(1, elements / kElementsPerThread);
  const int threads = at::in_parallel_region()
                          ? 1
                          : static_cast<int>(std::min<int64_t>(at::get_num_threads(), worthwhile));
  const cpu::Schedule schedule{partition.spans, threads};
  if (elements < kElementsToReleaseGil) return plan.rule().run_cpu(pass, schedule, phases);
  const std::vector<at::Tensor> alive = plan.tensors_in_use();
  const py::gil_scoped_release release;
  plan.rule().run_cpu(pass, schedule, phases);
}

#if FUSEDOPT_WITH_CUDA
cudaStream_t current_stream(c10::Device device) {
  if (!device.is_cuda()) return nullptr;
  static const py::object* const get =
      new py::object(py::module_::import("torch._C").attr("_cuda_getCurrentRawStream"));
  return reinterpret_cast<cudaStream_t>(py::cast<uintptr_t>((*get)(device.index())));
}

void run_on_cuda(Plan& plan, Partition& partition, Pass pass, Phases phases) {
  pass.tensors = partition.tables.tensors();
  pass.chunks = partition.tables.chunks();
  cuda::Launch launch{};
  launch.device = std::max<int>(0, partition.device.index());
  launch.stream = current_stream(partition.device);
  launch.tickets = partition.tables.tickets();
  keep_for_current_stream(partition, launch.stream);
  if (const size_t bytes = cuda::moving_bytes(pass); bytes > 0) {
    if (phases != Phases::kUpdate) {
      partition.moving = at::empty({static_cast<int64_t>(bytes)},
                                   at::TensorOptions(partition.device).dtype(at::kByte));
    }
    launch.moving = partition.moving.data_ptr();
  }
  const cudaError_t error = plan.rule().run_cuda(pass, launch, phases);
  TORCH_CHECK(error == cudaSuccess, "fusedopt: launching the step on ", partition.device,
              " failed with ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}
#endif

void run(Plan& plan, Partition& partition, const Pass& pass, Phases phases) {
#if FUSEDOPT_WITH_CUDA
  if (plan.on_cuda(partition)) return run_on_cuda(plan, partition, pass, phases);
#endif
  run_on_cpu(plan, partition, pass, phases);
}

at::Tensor slot(const Partition& partition, size_t offset) {
  return partition.control.narrow(0, static_cast<int64_t>(offset / sizeof(double)), 1);
}

at::Tensor sum_of(const Partition& partition) {
  return slot(partition, offsetof(StepControl, sum_of_squares));
}

// Each device's sum of squares becomes the sum over all devices, added in the order of the devices.
void add_up_devices(std::vector<Partition>& partitions) {
  at::Tensor total = sum_of(partitions[0]).clone();
  for (size_t i = 1; i < partitions.size(); ++i) {
    total.add_(sum_of(partitions[i]).to(total.device()));
  }
  for (Partition& partition : partitions) sum_of(partition).copy_(total);
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
    passes.push_back(make_pass(partition, request, owner));
  }
  if (partitions.size() == 1) {
    run(plan, partitions[0], passes[0], Phases::kBoth);
  } else {
    for (size_t i = 0; i < passes.size(); ++i) {
      if (request.measure) run(plan, partitions[i], passes[i], Phases::kMeasure);
    }
    if (request.measure) add_up_devices(partitions);
    for (size_t i = 0; i < passes.size(); ++i) {
      run(plan, partitions[i], passes[i], Phases::kUpdate);
    }
    if (!request.measure) {
      add_up_devices(partitions);
      slot(partitions[0], offsetof(StepControl, grad_norm)).copy_(sum_of(partitions[0]).sqrt());
    }
  }
  for (Partition& partition : partitions) {
    store_dense_params(partition);
    partition.dense_grads.clear();
  }
  return true;
}

bool built_with_cuda() { return FUSEDOPT_WITH_CUDA != 0; }

const char* cuda_device_type() { return FUSEDOPT_CUDA_DEVICE == c10::kCUDA ? "cuda" : "cpu"; }

}  // namespace fusedopt
