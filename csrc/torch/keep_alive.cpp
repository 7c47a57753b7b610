#include "torch/keep_alive.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <initializer_list>
#include <unordered_map>

namespace fusedopt {

namespace {

std::vector<at::Tensor> defined_of(std::initializer_list<at::Tensor> tensors) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& it : tensors) {
    if (it.defined()) result.push_back(it);
  }
  return result;
}

// What Python has made, and the workspace, which a new limit may have made anew.
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

void keep_for_current_stream(DeviceTensors& tensors, void* stream) {
  // A graph reads the tables at every replay, also when this plan has been replaced. torch has no
  // way to say so: they stay, with the rings and dense copies that there may be, until the process
  // ends.
  if (is_capturing(stream)) {
    // By storage, as a later graph may read more. Never destroyed: CUDA may be gone.
    static auto* const kept = new std::unordered_map<const void*, at::Tensor>;
    for (const auto& memory : {from_alloc_stream(tensors), from_any_stream(tensors)}) {
      for (const at::Tensor& it : memory) {
        kept->try_emplace(it.storage().unsafeGetStorageImpl(), it);
      }
    }
  }
  if (!tensors.device.is_cuda()) return;
  // torch's allocator gives memory back to the stream that it was allocated on, unless it knows of
  // others.
  const c10::Stream current = c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(tensors.device);
  for (const at::Tensor& it : from_any_stream(tensors)) it.record_stream(current);
  if (!tensors.alloc_stream.has_value()) tensors.alloc_stream = current;
  if (*tensors.alloc_stream == current) return;
  for (const at::Tensor& it : from_alloc_stream(tensors)) it.record_stream(current);
}

}  // namespace fusedopt
