// Fibers: stacks among which one OS thread switches by itself, within nanoseconds.
//
// ucontext enters each stack once. From then on __builtin_setjmp and __builtin_longjmp switch:
// swapcontext would make a system call every time, and longjmp, under _FORTIFY_SOURCE, refuses to
// jump to another stack. GCC has the two builtins on every target, Clang on x86-64.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>

#include "races.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

#ifndef __SANITIZE_ADDRESS__
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#endif

// Calls run() on a stack of its own, and again whenever it is resumed after run() has returned.
class Fiber {
 public:
  Fiber() {
    // The system commits a page when it is first touched: a stack costs what it uses.
    memory_ = static_cast<char*>(mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, kGuardBytes, PROT_NONE);  // An overflow faults instead of spilling over.

    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Fiber::main, 0);
    born_ = this;  // makecontext hands over no pointers.
    enter(&context);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  virtual ~Fiber() { munmap(memory_, kGuardBytes + kStackBytes); }

  // From outside: lets the fiber run until it suspends itself or run() returns.
  void resume() {
    idle_ = false;
    enter(nullptr);
  }

  // From inside: goes back to the caller of resume(), until the next resume().
  EMULATOR_UNSEEN void suspend() {
    void* shadow = nullptr;
    __sanitizer_start_switch_fiber(&shadow, outer_stack_, outer_bytes_);
    jump(inside_, outside_, nullptr);
    __sanitizer_finish_switch_fiber(shadow, &outer_stack_, &outer_bytes_);
  }

  // Whether run() has not begun or has returned.
  bool idle() const { return idle_; }

 private:
  static constexpr std::size_t kStackBytes = 256 << 10;
  static constexpr std::size_t kGuardBytes = 64 << 10;  // A page, where pages are largest.

  virtual void run() noexcept = 0;

  EMULATOR_UNSEEN static void main() {
    Fiber& self = *born_;
    __sanitizer_finish_switch_fiber(nullptr, &self.outer_stack_, &self.outer_bytes_);
    for (;;) {
      self.suspend();
      self.run();
      self.idle_ = true;
    }
  }

  EMULATOR_UNSEEN void enter(const ucontext_t* first) {
    void* shadow = nullptr;
    __sanitizer_start_switch_fiber(&shadow, stack(), kStackBytes);
    identity_.enter();
    jump(outside_, inside_, first);
    identity_.leave();
    __sanitizer_finish_switch_fiber(shadow, nullptr, nullptr);
  }

  // Opaque to the compiler, which must take any variable for changed once this returns, and to
  // ASan, which would clear the red zones of the stack being left.
  __attribute__((noipa, no_sanitize("address", "thread"))) static void jump(
      void** from, void** to, const ucontext_t* first) {
    if (__builtin_setjmp(from) != 0) return;
    if (first != nullptr) setcontext(first);
    __builtin_longjmp(to, 1);
  }

  char* stack() const { return memory_ + kGuardBytes; }

  inline static Fiber* born_ = nullptr;

  races::Identity identity_;
  char* memory_;
  bool idle_ = true;
  void* inside_[5];  // Where to go on; five words are what the builtins fill.
  void* outside_[5];
  const void* outer_stack_ = nullptr;  // The stack of resume()'s caller, for ASan.
  std::size_t outer_bytes_ = 0;
};

}  // namespace emulator
