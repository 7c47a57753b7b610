// Where a Python object's tensor was seen, to tell at the next step whether it is still there.
#pragma once

#include <torch/csrc/autograd/python_variable.h>

namespace fusedopt {

// Nothing is owned: the addresses are compared with what is there now, and serve to prefetch it.
struct TensorGuard {
  PyObject* object = nullptr;
  const c10::TensorImpl* impl = nullptr;
  const c10::StorageImpl* storage = nullptr;
  const void* base = nullptr;  // of the storage

  static TensorGuard of(PyObject* tensor) {
    TensorGuard guard;
    guard.object = tensor;
    guard.impl = THPVariable_Unpack(tensor).unsafeGetTensorImpl();
    guard.storage = guard.impl->unsafe_storage().unsafeGetStorageImpl();
    guard.base = base_of(guard.storage);
    return guard;
  }

  void prefetch() const {
    __builtin_prefetch(object);
    __builtin_prefetch(impl);
    __builtin_prefetch(reinterpret_cast<const char*>(impl) + 64);  // sizes and strides
    __builtin_prefetch(reinterpret_cast<const char*>(impl) + 128);
    __builtin_prefetch(storage);
  }

  // The object is still there, and a tensor.
  bool is_of(PyObject* tensor) const { return tensor == object && THPVariable_Check(tensor); }

  // Of an object that is.
  bool is_unchanged() const {
    const c10::TensorImpl* now = THPVariable_Unpack(object).unsafeGetTensorImpl();
    return now == impl && now->unsafe_storage().unsafeGetStorageImpl() == storage &&
           base_of(storage) == base;
  }

 private:
  static const void* base_of(const c10::StorageImpl* storage) {
    return storage == nullptr ? nullptr : storage->data();
  }
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
