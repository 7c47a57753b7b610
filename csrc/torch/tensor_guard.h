// Remembers where a Python object's tensor was, so that the next step sees whether it has moved.
#pragma once

#include "torch/python_tensor.h"

namespace fusedopt {

// The elements of a tensor with only these dispatch keys lie in memory as its sizes, strides and
// storage say. Any other key marks a subclass with operations of its own, a sparse layout, or a
// transform.
inline const uint64_t kPlainKeys =
    c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::CUDA,
                         c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA,
                         c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA,
                         c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::Negative})
        .raw_repr();

inline bool is_plain(const c10::TensorImpl* impl) {
  return (impl->key_set().raw_repr() & ~kPlainKeys) == 0 && impl->has_storage();
}

// Whether all elements of a plain tensor lie inside its storage. Other code may have freed or cut
// the storage.
inline bool fits_its_storage(const c10::TensorImpl* impl) {
  if (impl->numel() == 0) return true;
  int64_t last = impl->storage_offset();
  for (int64_t i = 0; i < impl->dim(); ++i) last += (impl->sizes()[i] - 1) * impl->strides()[i];
  const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  return storage->data() != nullptr && (last + 1) * impl->itemsize() <= storage->nbytes();
}

inline void prefetch(const c10::TensorImpl* impl) {
  __builtin_prefetch(impl);
  __builtin_prefetch(reinterpret_cast<const char*>(impl) + 64);  // sizes and strides
  __builtin_prefetch(reinterpret_cast<const char*>(impl) + 128);
}

// It owns nothing. The addresses are compared with the current ones, and are prefetched.
struct TensorGuard {
  PyObject* object = nullptr;
  c10::TensorImpl* impl = nullptr;
  const c10::StorageImpl* storage = nullptr;
  const void* base = nullptr;     // the address of the storage's memory
  const void* context = nullptr;  // the context of that address; a lazy clone changes it
  size_t nbytes = 0;              // the size of the storage
  uint64_t keys = 0;              // the dispatch keys, which say what kind of tensor it is
  int64_t storage_offset = 0;
  caffe2::TypeMeta dtype;

  // `tensor` must be a plain tensor.
  static TensorGuard of(PyObject* tensor) {
    TensorGuard guard;
    guard.object = tensor;
    guard.impl = unpack(tensor).unsafeGetTensorImpl();
    guard.storage = guard.impl->unsafe_storage().unsafeGetStorageImpl();
    guard.base = guard.storage->data_ptr().get();
    guard.context = guard.storage->data_ptr().get_context();
    guard.nbytes = guard.storage->nbytes();
    guard.keys = guard.impl->key_set().raw_repr();
    guard.storage_offset = guard.impl->storage_offset();
    guard.dtype = guard.impl->dtype();
    return guard;
  }

  void prefetch() const {
    __builtin_prefetch(object);
    fusedopt::prefetch(impl);
    __builtin_prefetch(storage);
  }

  // Whether `object`, which must be a tensor, is still the same tensor in the same memory and of
  // the same kind. The caller compares sizes and strides.
  bool is_unchanged() const {
    const c10::TensorImpl* now = unpack(object).unsafeGetTensorImpl();
    if (now != impl || now->unsafe_storage().unsafeGetStorageImpl() != storage) return false;
    // data_ptr() would first check whether this storage may give out a pointer.
    const c10::DataPtr& data =
        const_cast<c10::StorageImpl*>(storage)->_mutable_data_ptr_no_checks();
    return data.get() == base && data.get_context() == context && storage->nbytes() == nbytes &&
           impl->key_set().raw_repr() == keys && impl->storage_offset() == storage_offset &&
           impl->dtype() == dtype;
  }
};

// The same as c10's operator==, but inlined: for a few numbers, a call of memcmp takes longer than
// the loop.
inline bool equal(c10::IntArrayRef a, c10::IntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

// Whether the tensor has these sizes and strides. One loop compares both.
inline bool has_layout(const c10::TensorImpl* impl, c10::IntArrayRef sizes,
                       c10::IntArrayRef strides) {
  if (static_cast<size_t>(impl->dim()) != sizes.size()) return false;
  const int64_t* const its_sizes = impl->sizes().data();
  const int64_t* const its_strides = impl->strides().data();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (its_sizes[i] != sizes[i] || its_strides[i] != strides[i]) return false;
  }
  return true;
}

// Whether the strides a and b place the elements alike. The stride of a dimension of size 1 doesn't
// matter.
inline bool same_layout(c10::IntArrayRef sizes, c10::IntArrayRef a, c10::IntArrayRef b) {
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1 && a[i] != b[i]) return false;
  }
  return true;
}

}  // namespace fusedopt
