// Lets other Python threads run meanwhile, also while the interpreter ends.
#pragma once

#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace fusedopt {

// As pybind11's gil_scoped_release. But a daemon thread that wants the GIL back from an interpreter
// that is ending is ended by Python, by unwinding its stack, and C++ calls terminate() for that. It
// waits here for the process's end instead, as in Python 3.14.
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
