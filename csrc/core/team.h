// The threads of a step on the CPU.
#pragma once

namespace fusedopt {

// A front end's own pool of threads. schedule() asks it to call task(argument) once in one of its
// threads. It may do so late, even after the step.
struct Pool {
  void* pool = nullptr;
  void (*schedule)(void* pool, void (*task)(void*), void* argument) = nullptr;
};

// The thread that calls the kernels, and others that help it.
struct Team {
  int threads = 1;  // at most so many at once, with the caller's
  Pool pool;        // where the others come from; without schedule(): OpenMP
};

}  // namespace fusedopt
