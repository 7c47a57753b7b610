#include "sighting.h"

#include <torch/csrc/autograd/python_variable.h>

namespace fusedopt {

namespace {

const void* base_of(const c10::StorageImpl* storage) {
  return storage == nullptr ? nullptr : storage->data();
}

}  // namespace

Sighting Sighting::of(PyObject* object) {
  Sighting sighting;
  sighting.object = object;
  sighting.impl = THPVariable_Unpack(object).unsafeGetTensorImpl();
  sighting.storage = sighting.impl->unsafe_storage().unsafeGetStorageImpl();
  sighting.base = base_of(sighting.storage);
  return sighting;
}

void Sighting::prefetch() const {
  __builtin_prefetch(object);
  __builtin_prefetch(impl);
  __builtin_prefetch(reinterpret_cast<const char*>(impl) + 64);  // sizes and strides
  __builtin_prefetch(reinterpret_cast<const char*>(impl) + 128);
  __builtin_prefetch(storage);
}

bool Sighting::still_holds(PyObject* tensor) const {
  if (tensor != object || !THPVariable_Check(tensor)) return false;
  const c10::TensorImpl* now = THPVariable_Unpack(tensor).unsafeGetTensorImpl();
  return now == impl && now->unsafe_storage().unsafeGetStorageImpl() == storage &&
         base_of(storage) == base;
}

}  // namespace fusedopt
