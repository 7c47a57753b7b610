#include "torch/keep_alive.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <initializer_list>
#include <unordered_map>

#include "torch/cuda_stream.h"

namespace fusedopt {

namespace {

std::vector<at::Tensor> defined_of(std::initializer_list<at::Tensor> tensors) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& it : tensors) {
    if (it.defined()) result.push_back(it);
  }
  return result;
}

// Memory that may have been allocated on another stream than alloc_stream: tensors that Python has
// made, and the workspace, which a new limit replaces.
std::vector<at::Tensor> from_any_stream(const DeviceTensors& tensors) {
  return defined_of({tensors.control, tensors.step_ring, tensors.param_ring, tensors.limit_state,
                     tensors.workspace});
}

std::vector<at::Tensor> from_alloc_stream(const DeviceTensors& tensors) {
  std::vector<at::Tensor> memory;
  for (const DenseParam& it : tensors.dense_params) memory.push_back(it.dense);
  return memory;
}

}  // namespace

bool is_alloc_stream_current(const DeviceTensors& tensors) {
  const c10::Stream current = c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(tensors.device);
  return tensors.alloc_stream == current && !is_capturing(current_stream(tensors.device));
}

void keep_for_current_stream(DeviceTensors& tensors, void* stream) {
  // A captured graph reads this memory at every replay, even after the plan is replaced. torch
  // can't tell how long the graph lives: the memory stays until the process ends.
  if (is_capturing(stream)) {
    // The map is keyed by storage: a later capture adds only what is new. It is never destroyed, as
    // CUDA may be gone by then.
    static auto* const kept = new std::unordered_map<const void*, at::Tensor>;
    for (const auto& memory : {from_alloc_stream(tensors), from_any_stream(tensors)}) {
      for (const at::Tensor& it : memory) {
        kept->try_emplace(it.storage().unsafeGetStorageImpl(), it);
      }
    }
  }
  if (!tensors.device.is_cuda()) return;
  // torch's allocator lets the stream that memory was allocated on use it again at once. Tell the
  // allocator that the current stream uses it too.
  const c10::Stream current = c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(tensors.device);
  for (const at::Tensor& it : from_any_stream(tensors)) it.record_stream(current);
  if (!tensors.alloc_stream.has_value()) tensors.alloc_stream = current;
  if (*tensors.alloc_stream == current) return;
  for (const at::Tensor& it : from_alloc_stream(tensors)) it.record_stream(current);
}

}  // namespace fusedopt
