// The tensors of one device, and the tables that one pass over them reads.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <optional>
#include <vector>

#include "core/params.h"
#include "cpu/schedule.h"

namespace fusedopt {

// A parameter with gaps between its elements, and the dense copy that the kernels see.
struct DenseParam {
  c10::TensorImpl* param;  // not owned
  int index;               // in the partition
  at::Tensor dense;
  at::Tensor original;  // the parameter, during a step
};

// The tables that don't change from step to step, in the device's memory.
class DeviceTables {
 public:
  DeviceTables() = default;
  DeviceTables(const std::vector<TensorEntry>& tensors, const std::vector<Chunk>& chunks,
               const std::vector<int64_t>& first_chunk, c10::Device device);
  unsigned* tickets() const { return reinterpret_cast<unsigned*>(bytes_.data_ptr()); }
  const TensorEntry* tensors() const { return at<TensorEntry>(kTicketBytes); }
  const Chunk* chunks() const { return at<Chunk>(chunks_offset_); }
  const int64_t* first_chunks() const { return at<int64_t>(first_chunks_offset_); }
  const at::Tensor& memory() const { return bytes_; }

 private:
  static constexpr int64_t kTicketBytes = 16;
  template <class T>
  const T* at(int64_t offset) const {
    return reinterpret_cast<const T*>(static_cast<const char*>(bytes_.data_ptr()) + offset);
  }
  at::Tensor bytes_;
  int64_t chunks_offset_ = 0, first_chunks_offset_ = 0;
};

// What clips that look at every tensor or unit by itself need, on the device.
struct SegmentMemory {
  at::Tensor units, tensor_norms, unit_sums, coefs, chunk_coefs;
};

// The tensors of one device: what one pass walks over.
struct DeviceTensors {
  c10::Device device = at::kCPU;
  c10::Device device_key = at::kCPU;  // the same one, if not for tests; see partition_for
  std::vector<TensorEntry> tensors;
  std::vector<Chunk> chunks;
  std::vector<int64_t> first_chunk;  // of each tensor, and the end of the last
  std::vector<int64_t> unit_sizes;   // of each tensor; see `Units`
  std::vector<cpu::Span> spans;      // of chunks, for the CPU
  std::vector<const void*> grads;    // null: no gradient at this step
  std::vector<Group> groups;
  std::vector<int64_t> numbers;  // of each tensor, counted over all devices
  std::vector<DenseParam> dense_params;
  std::vector<at::Tensor> dense_grads;  // of gradients laid out otherwise, at this step
  at::Tensor chunk_sums;
  at::Tensor chunk_measures, step_ring, param_ring;  // telemetry, if it was asked for
  at::Tensor control;                                // a StepControl
  SegmentMemory own_clips;
  DeviceTables tables;   // CUDA only
  at::Tensor step_args;  // CUDA only: what doesn't fit in a kernel's arguments
  std::optional<c10::Stream>
      alloc_stream;       // CUDA only: the stream that was current at the first pass
  at::Tensor clip_state;  // of an adaptive limit, at this step
  bool on_cuda = false;

  // Once all tensors are known: the chunks, and memory for what the passes write.
  void lay_out(size_t num_groups, bool runs_on_cuda);

  // A pass over these tensors; its options are the caller's.
  StepParams step();

  // What a clip of that kind needs beside.
  OwnClips clips_for(ClipKind kind);

 private:
  void make_units();
};

// Which of the partitions is that of the tensor's device: a new one for the first tensor on it.
size_t device_tensors_for(const at::Tensor& tensor, std::vector<DeviceTensors>& devices);

}  // namespace fusedopt
