// The parts of fusedopt/distributed/local_view.py that look at every tensor of every step.
#pragma once

#include "torch/python.h"

namespace fusedopt {

// Whether groups and state still are the objects `seen`, in the order of Python's _objects().
bool is_same_view(const py::list& seen, const py::list& param_groups, const py::dict& state);

// Gives local tensors the local parts of their DTensors' gradients. Returns false at the first
// gradient whose layout is not the known one: the caller ends, and looks at each.
bool take_local_grads(const py::list& params, const py::list& locals, const py::list& layouts);

// Takes the gradients off the local tensors.
void drop_local_grads(const py::list& locals);

}  // namespace fusedopt
