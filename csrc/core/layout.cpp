#include "core/layout.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

namespace fusedopt {

namespace {

constexpr int64_t kTickets = 3;

template <class T>
int64_t bytes_of(int64_t count) {
  return count * static_cast<int64_t>(sizeof(T));
}

template <class T>
int64_t bytes_of(const std::vector<T>& table) {
  return bytes_of<T>(static_cast<int64_t>(table.size()));
}

template <class T>
T* at(char* workspace, int64_t offset) {
  return reinterpret_cast<T*>(workspace + offset);
}

template <class T>
void copy_table(const std::vector<T>& table, char* to) {
  if (!table.empty()) memcpy(to, table.data(), bytes_of(table));
}

void refuse(size_t tensor, const std::string& why) {
  throw std::invalid_argument("tensor " + std::to_string(tensor) + " " + why);
}

void check_sizes(size_t index, const TensorInfo& tensor, const Needs& needs) {
  if (tensor.numel < 0) refuse(index, "has a negative number of elements");
  if (tensor.row_size < 1 || tensor.numel % tensor.row_size != 0) {
    refuse(index, "has elements that are no whole number of rows");
  }
  if (tensor.group >= needs.num_groups) refuse(index, "has a group that doesn't exist");
}

void check_storages(size_t index, const TensorInfo& tensor, const Needs& needs) {
  if (!can_be_param(tensor.param)) refuse(index, "has a storage that no kernel knows");
  if (!can_be_grad(tensor.param, tensor.grad)) {
    refuse(index, "has a gradient of a storage that its kernels don't take");
  }
  for (int k = 0; k < needs.num_states; ++k) {
    if (!can_be_state(tensor.param, tensor.states[k])) {
      refuse(index, "has a state of a storage that its kernels don't take");
    }
  }
}

void check(const std::vector<TensorInfo>& tensors, const Needs& needs) {
  if (needs.num_states > kMaxStates || needs.num_scalars > kMaxScalars) {
    throw std::invalid_argument("a rule has more states or scalars than the tables have room for");
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_sizes(i, tensors[i], needs);
    check_storages(i, tensors[i], needs);
  }
}

}  // namespace

Layout::Layout(const std::vector<TensorInfo>& tensors, const Needs& needs) : needs_(needs) {
  check(tensors, needs);
  make_chunks(tensors);
  if (!needs.on_cuda) make_spans();
  const int64_t num_tensors = static_cast<int64_t>(shapes_.size());
  tickets_ = add(bytes_of<unsigned>(kTickets));
  shape_table_ = add(bytes_of(shapes_));
  pointer_table_ = add(bytes_of<void*>(num_tensors * num_pointers()));
  if (has_scales()) scale_table_ = add(bytes_of<float*>(num_tensors * needs.num_states));
  if (needs.segments == SegmentKind::kRows) row_table_ = add(bytes_of(rows_));
  chunk_table_ = add(bytes_of(chunks_));
  span_table_ = add(bytes_of(spans_));
  table_bytes_ = bytes_;

  chunk_sums_ = add(bytes_of<double>(num_chunks()));
  if (needs.telemetry) chunk_measures_ = add(bytes_of<ChunkMeasures>(num_chunks()));
  if (needs.segments == SegmentKind::kRows) {
    part_sums_ = add(bytes_of<SegmentSums>(num_rows_ + num_chunks()));
    part_coefs_ = add(bytes_of<double>(num_rows_ + num_chunks()));
  }
  if (needs.segments != SegmentKind::kNone) chunk_coefs_ = add(bytes_of<double>(num_chunks()));
  if (needs.trust_ratio) {
    trust_sums_ = add(bytes_of<TrustSums>(num_chunks()));
    trust_ratios_ = add(bytes_of<double>(num_tensors));
  }
  const StepArgs args(num_tensors, needs.num_groups, needs.num_hyperparameters);
  if (needs.on_cuda && args.bytes() > kInlinedArgs) step_args_ = add(args.bytes());
}

bool Layout::has_scales() const {
  return std::any_of(shapes_.begin(), shapes_.end(), [](const TensorShape& shape) {
    return std::any_of(std::begin(shape.states), std::end(shape.states), is_in_blocks);
  });
}

// Every part begins at a multiple of 16 bytes, which aligns every type in it.
Layout::Part Layout::add(int64_t bytes) {
  constexpr int64_t kAlignment = 16;
  const Part part{bytes_, bytes};
  bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return part;
}

void Layout::make_chunks(const std::vector<TensorInfo>& tensors) {
  for (const TensorInfo& tensor : tensors) {
    TensorShape shape{tensor.numel,         num_chunks(), tensor.group, tensor.number,
                      tensor.first_element, tensor.param, tensor.grad,  {}};
    std::copy(std::begin(tensor.states), std::end(tensor.states), shape.states);
    rows_.push_back({tensor.row_size, num_rows_});
    num_rows_ += tensor.numel / tensor.row_size;
    const uint32_t index = static_cast<uint32_t>(shapes_.size());
    for (int64_t i = 0; i * kChunkSize < tensor.numel; ++i) {
      chunks_.push_back({index, static_cast<uint32_t>(i)});
    }
    shapes_.push_back(shape);
  }
}

// Long spans help the processor's prefetchers. Short spans shorten the wait for the slowest thread
// at the end of a pass.
void Layout::make_spans() {
  const auto size_of = [&](const Chunk& chunk) { return chunk.size(shapes_[chunk.tensor].numel); };
  int64_t total = 0;
  for (const Chunk& chunk : chunks_) total += size_of(chunk);
  constexpr int64_t kSpans = 64, kLongest = 16 * kChunkSize;
  const int64_t wanted = std::clamp(total / kSpans, kChunkSize, kLongest);
  int64_t elements = wanted;  // the first chunk then begins a span
  for (int64_t i = 0; i < num_chunks(); ++i) {
    if (elements >= wanted) {
      spans_.push_back({i, i});
      elements = 0;
    }
    spans_.back().last = i + 1;
    elements += size_of(chunks_[i]);
  }
}

std::vector<char> Layout::tables(const std::vector<TensorPointers>& pointers) const {
  if (pointers.size() != shapes_.size()) {
    throw std::invalid_argument(std::to_string(pointers.size()) +
                                " tensors have pointers; expected " +
                                std::to_string(shapes_.size()));
  }
  std::vector<char> bytes(table_bytes_);
  copy_table(shapes_, bytes.data() + shape_table_.at);
  void** next = at<void*>(bytes.data(), pointer_table_.at);
  for (const TensorPointers& it : pointers) {
    *next++ = it.param;
    next = std::copy_n(it.states, needs_.num_states, next);
    next = std::copy_n(it.scalars, needs_.num_scalars, next);
    *next++ = it.rest;
  }
  if (scale_table_.bytes > 0) {
    float** to = at<float*>(bytes.data(), scale_table_.at);
    for (const TensorPointers& it : pointers) to = std::copy_n(it.scales, needs_.num_states, to);
  }
  if (row_table_.bytes > 0) copy_table(rows_, bytes.data() + row_table_.at);
  copy_table(chunks_, bytes.data() + chunk_table_.at);
  copy_table(spans_, bytes.data() + span_table_.at);
  return bytes;
}

void Layout::bind(char* workspace, StepParams& step) const {
  step.shapes = at<TensorShape>(workspace, shape_table_.at);
  step.pointers = at<void*>(workspace, pointer_table_.at);
  step.num_pointers = num_pointers();
  if (scale_table_.bytes > 0) step.scales = at<float*>(workspace, scale_table_.at);
  step.chunks = at<Chunk>(workspace, chunk_table_.at);
  step.spans = at<Span>(workspace, span_table_.at);
  step.num_tensors = static_cast<int64_t>(shapes_.size());
  step.num_chunks = num_chunks();
  step.num_spans = static_cast<int64_t>(spans_.size());
  step.num_groups = needs_.num_groups;
  step.num_hyperparameters = needs_.num_hyperparameters;
  step.tickets = at<unsigned>(workspace, tickets_.at);
  step.chunk_sums = at<double>(workspace, chunk_sums_.at);
  if (needs_.telemetry) step.chunk_measures = at<ChunkMeasures>(workspace, chunk_measures_.at);
  if (needs_.segments == SegmentKind::kRows) {
    step.rows = at<TensorRows>(workspace, row_table_.at);
    step.part_sums = at<SegmentSums>(workspace, part_sums_.at);
    step.part_coefs = at<double>(workspace, part_coefs_.at);
  }
  if (needs_.segments != SegmentKind::kNone) {
    step.chunk_coefs = at<double>(workspace, chunk_coefs_.at);
  }
  if (needs_.trust_ratio) {
    step.trust_sums = at<TrustSums>(workspace, trust_sums_.at);
    step.trust_ratios = at<double>(workspace, trust_ratios_.at);
  }
  if (step_args_.bytes > 0) step.step_args = workspace + step_args_.at;
}

}  // namespace fusedopt
