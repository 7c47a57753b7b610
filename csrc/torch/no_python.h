// Keeps Python code out of torch operations: modes, transforms and subclasses.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace fusedopt {

// While such an object lives, torch operations on plain tensors run no Python code. Python code
// could change the tensors that a step has just compared. Call no operation on a tensor subclass
// meanwhile.
class NoPythonDispatch {
  c10::impl::ExcludeDispatchKeyGuard guard_{c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
       c10::DispatchKey::PythonDispatcher, c10::DispatchKey::PreDispatch,
       c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
       c10::DispatchKey::FuncTorchDynamicLayerBackMode})};
};

}  // namespace fusedopt
