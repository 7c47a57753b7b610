// Which tensors share memory, by their addresses.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

namespace fusedopt {

// The bytes from a tensor's first element to its last.
struct MemoryRegion {
  const char* begin = nullptr;
  const char* end = nullptr;
  int owner = 0;          // whatever the caller numbers
  bool has_gaps = false;  // else every byte belongs to an element
  int64_t itemsize = 1;
  c10::IntArrayRef sizes, strides;  // the caller's

  // Of a plain tensor of these sizes and strides whose elements lie in its storage.
  static MemoryRegion of(const c10::TensorImpl* impl, c10::IntArrayRef sizes,
                         c10::IntArrayRef strides, int owner);
};

// The owners of every two regions of which some element is the same, in no particular order. Sorts
// the regions by their begin.
std::vector<std::pair<int, int>> overlapping_pairs(std::vector<MemoryRegion>& regions);

// Whether of two regions that overlap each has all elements of the other.
bool have_the_same_elements(const MemoryRegion& a, const MemoryRegion& b);

// The bytes that any of these regions covers, to look up others in.
class CoveredMemory {
 public:
  CoveredMemory() = default;
  explicit CoveredMemory(const std::vector<MemoryRegion>& sorted);
  bool touches(const void* begin, size_t bytes) const;

 private:
  std::vector<std::pair<const char*, const char*>> ranges_;  // sorted, apart from each other
};

}  // namespace fusedopt
