// Keeps other threads from resizing storages.
#pragma once

#include <c10/core/Storage.h>

#include <vector>

namespace fusedopt {

// Resizing a storage frees its memory, even if the storage is kept alive. torch refuses to resize
// storages that a SizeLock has taken, until the lock is destroyed. Hold the GIL to take storages
// and to destroy the lock.
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
      if (!impl->resizable()) continue;  // it never is, or another step has locked it
      impl->set_resizable(false);
      locked_.push_back(storage);
    }
  }

 private:
  std::vector<c10::Storage> locked_;
};

}  // namespace fusedopt
