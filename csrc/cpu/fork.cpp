#include "cpu/fork.h"

#include <pthread.h>

#include <atomic>

namespace fusedopt::cpu {

namespace {

std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool in_forked_child() { return forked; }

}  // namespace fusedopt::cpu
