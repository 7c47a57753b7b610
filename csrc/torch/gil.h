// Releases the GIL, also while the interpreter shuts down.
#pragma once

#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace fusedopt {

// The same as pybind11's gil_scoped_release, except while the interpreter shuts down. If a daemon
// thread then asks for the GIL, Python unwinds the thread's stack, and C++ would call terminate().
// Here the thread waits for the end of the process instead, as in Python 3.14.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() {
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      while (true) pause();
    }
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace fusedopt
