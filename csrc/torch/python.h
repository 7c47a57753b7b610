// pybind11's objects and errors. pybind11.h, which also defines functions and classes, takes
// seconds to compile: bindings.cpp alone includes it.
#pragma once

#include <pybind11/pytypes.h>

namespace py = pybind11;
