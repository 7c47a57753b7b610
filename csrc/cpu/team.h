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

// Work that the threads of a team share out: whoever comes in time does all that is left.
template <class Body>
struct Together {
  Body body;

  void lend(const Pool& pool, int helpers) const {
    share_call(pool, helpers, [this] {
      const IeeeArithmetic ieee;
      body();
    });
  }
  void join() const { body(); }
};

// Work of one thread. The others wait for it.
template <class Body>
struct Alone {
  Body body;

  void lend(const Pool&, int) const {
    const IeeeArithmetic ieee;
    body();
  }
  void join() const {
#pragma omp barrier
#pragma omp single
    body();
  }
};

template <class Body>
Together(Body) -> Together<Body>;
template <class Body>
Alone(Body) -> Alone<Body>;

// Does the work of all parts, one part after another. OpenMP's threads meet once for all of them, a
// pool's for each. A forked child has no other threads.
template <class... Parts>
void in_turn(const Team& team, const Parts&... parts) {
  [[maybe_unused]] const int threads = in_forked_child() ? 1 : team.threads;
  if (team.pool.schedule != nullptr) {
    (parts.lend(team.pool, threads - 1), ...);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const IeeeArithmetic ieee;
    (parts.join(), ...);
  }
}

}  // namespace fusedopt::cpu
