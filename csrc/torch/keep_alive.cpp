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
std::vector<at::Tensor> from_any_stream(const Partition& partition) {
  const OwnClipMemory& clips = partition.own_clips;
  return defined_of({partition.control, partition.step_ring, partition.param_ring,
                     partition.clip_state, clips.units, clips.tensor_norms, clips.unit_sums,
                     clips.coefs, clips.chunk_coefs});
}

std::vector<at::Tensor> from_home(const Partition& partition) {
  std::vector<at::Tensor> memory =
      defined_of({partition.chunk_sums, partition.tables.memory(), partition.chunk_measures});
  for (const DenseParam& it : partition.dense_params) memory.push_back(it.dense);
  return memory;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

}  // namespace

void keep_for_current_stream(Partition& partition, cudaStream_t stream) {
  // A graph reads the tables at every replay, also when this plan has been replaced. torch has no
  // way to say so: they stay, with the rings and dense copies that there may be, until the process
  // ends.
  if (is_capturing(stream)) {
    // By storage, as a later graph may read more. Never destroyed: CUDA may be gone.
    static auto* const kept = new std::unordered_map<const void*, at::Tensor>;
    for (const auto& memory : {from_home(partition), from_any_stream(partition)}) {
      for (const at::Tensor& it : memory) {
        kept->try_emplace(it.storage().unsafeGetStorageImpl(), it);
      }
    }
  }
  if (!partition.device.is_cuda()) return;
  // torch's allocator gives memory back to the stream that it was allocated on, unless it knows of
  // others.
  const c10::Stream current = c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(partition.device);
  for (const at::Tensor& it : from_any_stream(partition)) it.record_stream(current);
  if (!partition.home.has_value()) partition.home = current;
  if (*partition.home == current) return;
  for (const at::Tensor& it : from_home(partition)) it.record_stream(current);
}

}  // namespace fusedopt

#endif
