// Where a Python object's tensor was seen, to tell at the next step whether it is still there.
#pragma once

#include <torch/csrc/utils/pybind.h>
#include <torch/types.h>

namespace fusedopt {

// Nothing is owned: the addresses are compared with what is there now, and serve to prefetch it.
struct Sighting {
  PyObject* object = nullptr;
  const c10::TensorImpl* impl = nullptr;
  const c10::StorageImpl* storage = nullptr;
  const void* base = nullptr;  // of the storage

  static Sighting of(PyObject* tensor);
  void prefetch() const;
  bool still_holds(PyObject* tensor) const;
};

// As c10's operator==, in place: for a handful of numbers a call of memcmp costs more than the
// loop.
inline bool equal(c10::IntArrayRef a, c10::IntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

}  // namespace fusedopt
