#include "torch/memory_overlap.h"

#include <algorithm>
#include <numeric>

namespace fusedopt {

namespace {

bool intersect(const MemoryRegion& a, const MemoryRegion& b) {
  return a.begin < b.end && b.begin < a.end;
}

// The distance in bytes between any two elements is a multiple of the result.
int64_t gcd_of_strides(const MemoryRegion& region) {
  int64_t result = 0;
  for (size_t i = 0; i < region.sizes.size(); ++i) {
    if (region.sizes[i] > 1) result = std::gcd(result, region.strides[i]);
  }
  return result * region.itemsize;
}

// Whether both regions repeat with a common period, and each fills its own bytes of the period.
// That is so for two columns of one matrix, or for real and imaginary parts.
bool are_apart_in_every_period(const MemoryRegion& a, const MemoryRegion& b) {
  const int64_t period = std::gcd(gcd_of_strides(a), gcd_of_strides(b));
  if (period == 0) return false;
  const int64_t distance = ((b.begin - a.begin) % period + period) % period;
  return distance >= a.itemsize && distance + b.itemsize <= period;
}

// Calls visit() with the first byte of each element, until a call returns true.
template <class Visit>
bool any_element(const MemoryRegion& region, const char* at, size_t dim, const Visit& visit) {
  if (dim == region.sizes.size()) return visit(at);
  for (int64_t i = 0; i < region.sizes[dim]; ++i) {
    const char* const next = at + i * region.strides[dim] * region.itemsize;
    if (any_element(region, next, dim + 1, visit)) return true;
  }
  return false;
}

// Marks the bytes of `a`, and looks for marked bytes among those of `b`.
bool have_an_element_in_common(const MemoryRegion& a, const MemoryRegion& b) {
  const char* const begin = std::max(a.begin, b.begin);
  const int64_t bytes = std::min(a.end, b.end) - begin;
  std::vector<bool> taken(bytes, !a.has_gaps);
  const auto each_byte = [&](const MemoryRegion& region, const auto& visit) {
    if (!region.has_gaps) {
      for (int64_t i = 0; i < bytes; ++i) {
        if (visit(i)) return true;
      }
      return false;
    }
    return any_element(region, region.begin, 0, [&](const char* at) {
      for (int64_t i = at - begin; i < at - begin + region.itemsize; ++i) {
        if (i >= 0 && i < bytes && visit(i)) return true;
      }
      return false;
    });
  };
  each_byte(a, [&](int64_t i) { return taken[i] = true, false; });
  return each_byte(b, [&](int64_t i) -> bool { return taken[i]; });
}

bool overlap(const MemoryRegion& a, const MemoryRegion& b) {
  if (!intersect(a, b)) return false;
  if (!a.has_gaps && !b.has_gaps) return true;
  if (a.has_gaps && b.has_gaps && are_apart_in_every_period(a, b)) return false;
  return have_an_element_in_common(a, b);
}

}  // namespace

MemoryRegion MemoryRegion::of(const c10::TensorImpl* impl, c10::IntArrayRef sizes,
                              c10::IntArrayRef strides, int owner) {
  MemoryRegion region;
  region.owner = owner;
  region.itemsize = static_cast<int64_t>(impl->itemsize());
  region.begin = region.end = static_cast<const char*>(impl->unsafe_storage().data()) +
                              impl->storage_offset() * region.itemsize;
  region.sizes = sizes;
  region.strides = strides;
  if (impl->numel() == 0) return region;
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  region.end += (last + 1) * region.itemsize;
  region.has_gaps = last + 1 != impl->numel();
  return region;
}

std::vector<std::pair<int, int>> overlapping_pairs(std::vector<MemoryRegion>& regions) {
  std::sort(regions.begin(), regions.end(), [](const MemoryRegion& a, const MemoryRegion& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.owner < b.owner;
  });
  std::vector<std::pair<int, int>> result;
  std::vector<const MemoryRegion*> open;  // earlier ones that end after this one begins
  for (const MemoryRegion& region : regions) {
    if (region.begin == region.end) continue;
    const auto ended = [&](const MemoryRegion* it) { return it->end <= region.begin; };
    open.erase(std::remove_if(open.begin(), open.end(), ended), open.end());
    for (const MemoryRegion* it : open) {
      if (overlap(*it, region)) result.push_back(std::minmax(it->owner, region.owner));
    }
    open.push_back(&region);
  }
  return result;
}

bool have_the_same_elements(const MemoryRegion& a, const MemoryRegion& b) {
  if (a.begin != b.begin || a.end != b.end || a.itemsize != b.itemsize) return false;
  return (!a.has_gaps && !b.has_gaps) || (a.sizes == b.sizes && a.strides == b.strides);
}

CoveredMemory::CoveredMemory(const std::vector<MemoryRegion>& sorted) {
  for (const MemoryRegion& region : sorted) {
    if (ranges_.empty() || region.begin > ranges_.back().second) {
      ranges_.emplace_back(region.begin, region.end);
    } else {
      ranges_.back().second = std::max(ranges_.back().second, region.end);
    }
  }
}

bool CoveredMemory::touches(const void* begin, size_t bytes) const {
  const char* const first = static_cast<const char*>(begin);
  const auto after =
      std::lower_bound(ranges_.begin(), ranges_.end(), first + bytes,
                       [](const auto& range, const char* at) { return range.first < at; });
  return after != ranges_.begin() && std::prev(after)->second > first;
}

}  // namespace fusedopt
