// Finds tensors that share memory, by their addresses.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

namespace fusedopt {

// The bytes from a tensor's first element to its last.
struct MemoryRegion {
  const char* begin = nullptr;
  const char* end = nullptr;
  int owner = 0;          // a number that the caller chooses
  bool has_gaps = false;  // whether some bytes belong to no element
  int64_t itemsize = 1;
  c10::IntArrayRef sizes, strides;  // views: the caller keeps their memory

  // The region of a plain tensor with these sizes and strides. All elements must lie in its
  // storage.
  static MemoryRegion of(const c10::TensorImpl* impl, c10::IntArrayRef sizes,
                         c10::IntArrayRef strides, int owner);
};

// Returns the owners of every pair of regions that have an element in common, in no particular
// order. Sorts `regions` by `begin`.
std::vector<std::pair<int, int>> overlapping_pairs(std::vector<MemoryRegion>& regions);

// Whether two regions that overlap consist of the same elements.
bool have_the_same_elements(const MemoryRegion& a, const MemoryRegion& b);

// All bytes that a list of regions covers.
class CoveredMemory {
 public:
  CoveredMemory() = default;
  explicit CoveredMemory(const std::vector<MemoryRegion>& sorted);
  bool touches(const void* begin, size_t bytes) const;

 private:
  std::vector<std::pair<const char*, const char*>> ranges_;  // sorted; no two of them touch
};

}  // namespace fusedopt
