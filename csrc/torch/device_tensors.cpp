#include "torch/device_tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

#include "torch/cuda_stream.h"
#if FUSEDOPT_WITH_CUDA
#include "cuda/passes.h"
#endif

namespace fusedopt {

namespace {

// The emulator has one device's memory, and its own idea of which tensors lie apart.
#if !defined(FUSEDOPT_DEVICE_KEY)
#define FUSEDOPT_DEVICE_KEY(tensor) (tensor).device()
#endif

// A table in the memory that kernels read: the CPU's, or (without a wait for it) a GPU's.
at::Tensor upload(const void* table, size_t size, c10::Device device, bool on_cuda) {
  const auto options = at::TensorOptions(device).dtype(at::kByte);
  at::Tensor bytes = at::empty({static_cast<int64_t>(size)}, options);
#if FUSEDOPT_WITH_CUDA
  if (on_cuda) {
    check_launch(
        cuda::upload(device_index(device), current_stream(device), bytes.data_ptr(), table, size),
        device);
    return bytes;
  }
#endif
  if (size > 0) memcpy(bytes.data_ptr(), table, size);
  return bytes;
}

}  // namespace

DeviceTables::DeviceTables(const std::vector<TensorEntry>& tensors,
                           const std::vector<Chunk>& chunks,
                           const std::vector<int64_t>& first_chunk, c10::Device device) {
  const size_t tensor_bytes = tensors.size() * sizeof(TensorEntry);
  const size_t chunk_bytes = chunks.size() * sizeof(Chunk);
  chunks_offset_ = kTicketBytes + static_cast<int64_t>(tensor_bytes);
  const size_t first_chunk_bytes = first_chunk.size() * sizeof(int64_t);
  first_chunks_offset_ = chunks_offset_ + static_cast<int64_t>(chunk_bytes);
  std::vector<char> host(first_chunks_offset_ + first_chunk_bytes);
  if (tensor_bytes > 0) memcpy(&host[kTicketBytes], tensors.data(), tensor_bytes);
  if (chunk_bytes > 0) memcpy(&host[chunks_offset_], chunks.data(), chunk_bytes);
  if (first_chunk_bytes > 0) {
    memcpy(&host[first_chunks_offset_], first_chunk.data(), first_chunk_bytes);
  }
  bytes_ = upload(host.data(), host.size(), device, true);
}

void DeviceTensors::lay_out(size_t num_groups, bool runs_on_cuda) {
  for (size_t t = 0; t < tensors.size(); ++t) {
    first_chunk.push_back(static_cast<int64_t>(chunks.size()));
    for (int64_t i = 0; i * kChunkSize < tensors[t].numel; ++i) {
      chunks.push_back({static_cast<uint32_t>(t), static_cast<uint32_t>(i)});
    }
  }
  first_chunk.push_back(static_cast<int64_t>(chunks.size()));
  spans = cpu::make_spans(tensors.data(), chunks);
  grads.resize(tensors.size());
  groups.resize(num_groups);
  const auto doubles = at::TensorOptions(device).dtype(at::kDouble);
  chunk_sums = at::empty({static_cast<int64_t>(chunks.size())}, doubles);
  control = at::zeros({sizeof(StepControl) / sizeof(double)}, doubles);
  on_cuda = runs_on_cuda;
  if (param_ring.defined()) {
    constexpr int64_t kMeasures = sizeof(ChunkMeasures) / sizeof(double);
    // One at least: a null pointer says that nobody asked for telemetry.
    const int64_t rows = std::max<int64_t>(1, static_cast<int64_t>(chunks.size()));
    chunk_measures = at::empty({rows, kMeasures}, doubles);
  }
  if (on_cuda) {
    const bool telemetry = param_ring.defined();
    tables =
        DeviceTables(tensors, chunks, telemetry ? first_chunk : std::vector<int64_t>(), device);
  }
}

StepParams DeviceTensors::step() {
  StepParams step{};
  step.tensors = on_cuda ? tables.tensors() : tensors.data();
  step.chunks = on_cuda ? tables.chunks() : chunks.data();
  step.groups = groups.data();
  step.grads = grads.data();
  step.chunk_sums = chunk_sums.data_ptr<double>();
  step.control = static_cast<StepControl*>(control.data_ptr());
  step.num_tensors = static_cast<int64_t>(tensors.size());
  step.num_chunks = static_cast<int64_t>(chunks.size());
  step.num_groups = static_cast<int64_t>(groups.size());
  if (param_ring.defined()) {
    step.first_chunks = on_cuda ? tables.first_chunks() : first_chunk.data();
    step.telemetry.chunks = static_cast<ChunkMeasures*>(chunk_measures.data_ptr());
    step.telemetry.params = static_cast<ParamRow*>(param_ring.data_ptr());
    step.telemetry.rows = param_ring.size(0);
    if (step_ring.defined()) step.telemetry.steps = step_ring.data_ptr<double>();
  }
  return step;
}

OwnClips DeviceTensors::clips_for(ClipKind kind) {
  if (kind != ClipKind::kPerTensor && kind != ClipKind::kUnit) return {};
  const auto doubles = at::TensorOptions(device).dtype(at::kDouble);
  const int64_t num_tensors = static_cast<int64_t>(tensors.size());
  if (!own_clips.units.defined()) make_units();
  OwnClips clips{};
  clips.units = static_cast<const Units*>(own_clips.units.data_ptr());
  if (kind == ClipKind::kPerTensor) {
    if (!own_clips.tensor_norms.defined()) own_clips.tensor_norms = at::empty(num_tensors, doubles);
    clips.tensor_norms = own_clips.tensor_norms.data_ptr<double>();
    return clips;
  }
  if (!own_clips.coefs.defined()) {
    int64_t num_units = 0;
    for (int64_t t = 0; t < num_tensors; ++t) num_units += tensors[t].numel / unit_sizes[t];
    const int64_t num_chunks = static_cast<int64_t>(chunks.size());
    own_clips.unit_sums = at::empty({num_units + num_chunks, 2}, doubles);
    own_clips.coefs = at::empty(num_units + num_chunks, doubles);
    own_clips.chunk_coefs = at::empty(num_chunks, doubles);
  }
  clips.coefs = own_clips.coefs.data_ptr<double>();
  clips.chunk_coefs = own_clips.chunk_coefs.data_ptr<double>();
  clips.unit_sums = static_cast<UnitSums*>(own_clips.unit_sums.data_ptr());
  return clips;
}

void DeviceTensors::make_units() {
  std::vector<Units> units;
  int64_t num_units = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    units.push_back({unit_sizes[t], num_units + first_chunk[t], first_chunk[t], numbers[t]});
    num_units += tensors[t].numel / unit_sizes[t];
  }
  own_clips.units = upload(units.data(), units.size() * sizeof(Units), device, on_cuda);
}

size_t device_tensors_for(const at::Tensor& tensor, std::vector<DeviceTensors>& devices) {
  const c10::Device device_key = FUSEDOPT_DEVICE_KEY(tensor);
  const auto found = std::find_if(devices.begin(), devices.end(), [&](const DeviceTensors& it) {
    return it.device_key == device_key;
  });
  if (found != devices.end()) return found - devices.begin();
  DeviceTensors& device_tensors = devices.emplace_back();
  device_tensors.device = tensor.device();
  device_tensors.device_key = device_key;
  return devices.size() - 1;
}

}  // namespace fusedopt
