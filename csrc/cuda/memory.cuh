// One load or store of global memory, at an address that is aligned as its type.
#pragma once

#include <cuda_runtime.h>

namespace fusedopt::cuda {

#if defined(__CUDACC__)

// The pointers come from tables. Unless the compiler is told what they point to, each access finds
// out for itself.
template <class T>
__device__ T load_global(const T* from) {
  __builtin_assume(__isGlobal(from));
  return *from;
}

template <class T>
__device__ void store_global(T* to, const T& value) {
  __builtin_assume(__isGlobal(to));
  *to = value;
}

// Arguments lie in constant memory, which serves a warp one address after the other. Where the
// compiler doesn't know what it points to, all threads' addresses are loaded at once.
template <class T>
__device__ const T* like_other_memory(const T* argument) {
  asm("" : "+l"(argument));
  return argument;
}

#else

template <class T>
const T* like_other_memory(const T* argument) {
  return argument;
}

// The emulator's check the address, and count the bytes.
using emulator::load_global;
using emulator::store_global;

#endif

}  // namespace fusedopt::cuda
