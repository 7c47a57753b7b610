#include "partition.h"

#include <cstring>

namespace fusedopt {

DeviceTables::DeviceTables(const std::vector<TensorEntry>& tensors,
                           const std::vector<Chunk>& chunks, c10::Device device) {
  const size_t tensor_bytes = tensors.size() * sizeof(TensorEntry);
  const size_t chunk_bytes = chunks.size() * sizeof(Chunk);
  chunks_offset_ = kTicketBytes + static_cast<int64_t>(tensor_bytes);
  at::Tensor host = at::zeros({chunks_offset_ + static_cast<int64_t>(chunk_bytes)}, at::kByte);
  char* to = static_cast<char*>(host.data_ptr());
  if (tensor_bytes > 0) memcpy(to + kTicketBytes, tensors.data(), tensor_bytes);
  if (chunk_bytes > 0) memcpy(to + chunks_offset_, chunks.data(), chunk_bytes);
  bytes_ = host.to(device);
}

void Partition::lay_out(size_t num_groups, bool on_cuda) {
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
  if (on_cuda) tables = DeviceTables(tensors, chunks, device);
}

}  // namespace fusedopt
