#include "torch/keep_alive.h"

#if FUSEDOPT_WITH_CUDA

#include <c10/core/impl/VirtualGuardImpl.h>

#include <initializer_list>
#include <unordered_map>
#include <vector>

namespace fusedopt {

namespace {

std::vector<at::Tensor> defined_of(std::initializer_list<at::Tensor> tensors) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& it : tensors) {
    if (it.defined()) result.push_back(it);
  }
  return result;
}

// What Python has made, and what a limit needs that was set between two steps.
std::vector<at::Tensor> from_any_stream(const DeviceTensors& device_tensors) {
  const SegmentMemory& clips = device_tensors.own_clips;
  return defined_of({device_tensors.control, device_tensors.step_ring, device_tensors.param_ring,
                     device_tensors.clip_state, clips.units, clips.tensor_norms, clips.unit_sums,
                     clips.coefs, clips.chunk_coefs});
}

std::vector<at::Tensor> from_alloc_stream(const DeviceTensors& device_tensors) {
  std::vector<at::Tensor> memory = defined_of(
      {device_tensors.chunk_sums, device_tensors.tables.memory(), device_tensors.chunk_measures});
  for (const DenseParam& it : device_tensors.dense_params) memory.push_back(it.dense);
  return memory;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

}  // namespace

void keep_for_current_stream(DeviceTensors& device_tensors, cudaStream_t stream) {
  // A graph reads the tables at every replay, also when this plan has been replaced. torch has no
  // way to say so: they stay, with the rings and dense copies that there may be, until the process
  // ends.
  if (is_capturing(stream)) {
    // By storage, as a later graph may read more. Never destroyed: CUDA may be gone.
    static auto* const kept = new std::unordered_map<const void*, at::Tensor>;
    for (const auto& memory :
         {from_alloc_stream(device_tensors), from_any_stream(device_tensors)}) {
      for (const at::Tensor& it : memory) {
        kept->try_emplace(it.storage().unsafeGetStorageImpl(), it);
      }
    }
  }
  if (!device_tensors.device.is_cuda()) return;
  // torch's allocator gives memory back to the stream that it was allocated on, unless it knows of
  // others.
  const c10::Stream current =
      c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(device_tensors.device);
  for (const at::Tensor& it : from_any_stream(device_tensors)) it.record_stream(current);
  if (!device_tensors.alloc_stream.has_value()) device_tensors.alloc_stream = current;
  if (*device_tensors.alloc_stream == current) return;
  for (const at::Tensor& it : from_alloc_stream(device_tensors)) it.record_stream(current);
}

}  // namespace fusedopt

#endif
