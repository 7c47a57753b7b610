// What ThreadSanitizer is told, so that it finds the data races of a grid whose threads take turns
// on one thread of the host. Without -fsanitize=thread all of this does nothing.
//
//  - A launch comes after whatever its caller did before, and is over when it returns.
//  - A barrier, or __syncwarp, orders what its threads did before and do after. Shuffles and votes
//    order nothing: CUDA promises no more.
//  - What a thread did before a fence comes before what another block's does after one of its own,
//    if that block has met an atomic in between.
//  - Nothing else orders two blocks, though one runs after the other here.
//  - Atomics race with nothing.
#pragma once

// A function that the sanitizer leaves alone: the emulator's, amid a kernel's.
#define EMULATOR_UNSEEN __attribute__((no_sanitize("thread")))

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>

#include <cstdint>

extern "C" {
// Of the sanitizer's, without a header.
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_java_init(std::uintptr_t begin, std::uintptr_t size);
void __tsan_java_alloc(std::uintptr_t begin, std::uintptr_t size);
// The linker's: where static variables lie that begin as zero.
extern __attribute__((visibility("hidden"))) char __bss_start[], _end[];
}
#endif

namespace emulator::races {

// Something that is released by some threads, and acquired by others who come after them then.
struct alignas(8) Place {};

#ifdef __SANITIZE_THREAD__

inline constexpr bool kWatched = true;

inline void release(Place& place) { __tsan_release(&place); }
inline void acquire(Place& place) { __tsan_acquire(&place); }

// While it exists, the running thread's accesses are the emulator's own.
class Unseen {
 public:
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// A fiber as the sanitizer knows it: a thread.
class Identity {
 public:
  Identity() : mine_(__tsan_create_fiber(0)) {}
  Identity(const Identity&) = delete;
  Identity& operator=(const Identity&) = delete;
  ~Identity() { __tsan_destroy_fiber(mine_); }

  EMULATOR_UNSEEN void enter() {
    outer_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(mine_, __tsan_switch_to_fiber_no_sync);
  }
  EMULATOR_UNSEEN void leave() { __tsan_switch_to_fiber(outer_, __tsan_switch_to_fiber_no_sync); }

 private:
  void* const mine_;
  void* outer_ = nullptr;
};

// From here on the contents of __shared__ variables, and of all others that begin as zero, are
// nobody's: what a block before has done to them doesn't count. Memory can be declared to be new
// only where it is a heap, as of a language with its own.
inline void renew_shared_memory() {
  const auto begin = (reinterpret_cast<std::uintptr_t>(__bss_start) + 7) / 8 * 8;
  const auto size = (reinterpret_cast<std::uintptr_t>(_end) - begin) / 8 * 8;
  static const bool declared = (__tsan_java_init(begin, size), true);
  if (declared) __tsan_java_alloc(begin, size);
}

#else

inline constexpr bool kWatched = false;

inline void release(Place&) {}
inline void acquire(Place&) {}
struct Unseen {
  Unseen() {}  // Or a compiler warns of a variable without a use.
};
struct Identity {
  void enter() {}
  void leave() {}
};
inline void renew_shared_memory() {}

#endif

}  // namespace emulator::races
