// A call that threads of a pool join.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>

#include "core/team.h"

namespace fusedopt::cpu {

// Threads of a pool may come when the call has ended long since: then they find it closed. Nobody
// waits for a thread that hasn't come, so that a pool whose threads are all busy can't block a
// step.
class SharedCall {
 public:
  SharedCall(void (*call)(const void*), const void* body) : call_(call), body_(body) {}

  void join() {
    if (!enter()) return;
    call_(body_);
    leave();
  }

  // Waits for those who have joined. Nobody joins after it.
  void close() {
    std::unique_lock<std::mutex> lock(mutex_);
    closed_ = true;
    empty_.wait(lock, [&] { return inside_ == 0; });
  }

 private:
  bool enter() {
    const std::lock_guard<std::mutex> lock(mutex_);
    inside_ += closed_ ? 0 : 1;
    return !closed_;
  }

  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--inside_ == 0) empty_.notify_one();
  }

  void (*const call_)(const void*);
  const void* const body_;
  std::mutex mutex_;
  std::condition_variable empty_;
  bool closed_ = false;
  int inside_ = 0;
};

// Calls body() in this thread, and in up to `helpers` threads of the pool.
template <class Body>
void share_call(const Pool& pool, int helpers, const Body& body) {
  using Shared = std::shared_ptr<SharedCall>;
  const auto call = [](const void* its) { (*static_cast<const Body*>(its))(); };
  const auto shared = std::make_shared<SharedCall>(call, &body);
  const auto join = [](void* argument) {
    const std::unique_ptr<Shared> its(static_cast<Shared*>(argument));
    (*its)->join();
  };
  for (int i = 0; i < helpers; ++i) pool.schedule(pool.pool, join, new Shared(shared));
  body();
  shared->close();
}

}  // namespace fusedopt::cpu
