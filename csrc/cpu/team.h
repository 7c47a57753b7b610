// How the threads of a team run the same code at once.
#pragma once

#include <cfenv>

#include "core/team.h"
#include "cpu/fork.h"
#include "cpu/shared_call.h"

namespace fusedopt::cpu {

// Switches its thread to IEEE arithmetic for as long as the object lives. torch.set_flush_denormal,
// or a library that was built with -ffast-math, may have disabled subnormal numbers on some
// threads.
class IeeeArithmetic {
 public:
  IeeeArithmetic() {
    fegetenv(&before_);
    fesetenv(FE_DFL_ENV);
  }
  ~IeeeArithmetic() { fesetenv(&before_); }
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;

 private:
  fenv_t before_;
};

// Calls body() in the caller's thread, and in the other threads of the team that come in time. The
// bodies share out the work: whoever is there does all that is left. A forked child has no other
// threads.
template <class Body>
void in_parallel(const Team& team, Body body) {
  const auto work = [&] {
    const IeeeArithmetic ieee;
    body();
  };
  [[maybe_unused]] const int threads = in_forked_child() ? 1 : team.threads;
  if (team.pool.schedule != nullptr) return share_call(team.pool, threads - 1, work);
#pragma omp parallel num_threads(threads)
  work();
}

}  // namespace fusedopt::cpu
