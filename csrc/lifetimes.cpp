#include "lifetimes.h"

#if FUSEDOPT_WITH_CUDA

#include <c10/core/impl/VirtualGuardImpl.h>

#include <unordered_map>

namespace fusedopt {

namespace {

std::vector<at::Tensor> memory_of(const Partition& partition) {
  std::vector<at::Tensor> memory{partition.chunk_sums, partition.control,
                                 partition.tables.memory()};
  for (const at::Tensor& it :
       {partition.chunk_measures, partition.step_ring, partition.param_ring,
        partition.own_clips.units, partition.own_clips.tensor_norms, partition.own_clips.unit_sums,
        partition.own_clips.coefs, partition.own_clips.chunk_coefs, partition.clip_state}) {
    if (it.defined()) memory.push_back(it);
  }
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
    for (const at::Tensor& tensor : memory_of(partition)) {
      kept->try_emplace(tensor.storage().unsafeGetStorageImpl(), tensor);
    }
  }
  if (!partition.device.is_cuda()) return;
  // torch's allocator gives memory back to the stream that it was allocated on, unless it knows of
  // others. What Python has made may come from any stream.
  const c10::Stream current = c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(partition.device);
  for (const at::Tensor& it :
       {partition.control, partition.step_ring, partition.param_ring, partition.clip_state}) {
    if (it.defined()) it.record_stream(current);
  }
  if (!partition.home.has_value()) partition.home = current;
  if (*partition.home == current) return;
  for (const at::Tensor& tensor : memory_of(partition)) tensor.record_stream(current);
}

}  // namespace fusedopt

#endif
