// Storages that no other thread can resize for a while.
#pragma once

#include <c10/core/Storage.h>

#include <vector>

namespace fusedopt {

// To resize a storage is to free its memory, also of tensors that are kept alive. While one of
// these lives, torch refuses to. Take and end it with the GIL.
class SizeLock {
 public:
  SizeLock() = default;
  SizeLock(const SizeLock&) = delete;
  SizeLock& operator=(const SizeLock&) = delete;
  ~SizeLock() {
    for (const c10::Storage& storage : locked_) storage.unsafeGetStorageImpl()->set_resizable(true);
  }

  void take(const std::vector<c10::Storage>& storages) {
    locked_.reserve(storages.size());
    for (const c10::Storage& storage : storages) {
      c10::StorageImpl* const impl = storage.unsafeGetStorageImpl();
      if (!impl->resizable()) continue;  // never, or not while another step locks it
      impl->set_resizable(false);
      locked_.push_back(storage);
    }
  }

 private:
  std::vector<c10::Storage> locked_;
};

}  // namespace fusedopt
