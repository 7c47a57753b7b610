#pragma once

#include "torch/python.h"

namespace fusedopt {

// Gives every parameter a gradient, or None, in the parameter's dtype. Returns those that they had;
// None if they had these. An error changes nothing.
py::object swap_grads(const py::list& params, const py::list& grads);

}  // namespace fusedopt
