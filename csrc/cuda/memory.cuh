// Loads and stores of global memory. The address must be aligned as its type.
#pragma once

#include <cuda_runtime.h>

namespace fusedopt::cuda {

#if defined(__CUDACC__)

// The pointers come from tables, so that the compiler doesn't know that they point to global
// memory. Without the assumption it uses generic instructions, which check the address at each
// access.
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

// Hides from the compiler that a pointer points to a kernel's arguments. They lie in constant
// memory, whose instructions serve a warp one address after the other. Generic loads serve all
// threads' addresses at once.
template <class T>
__device__ const T* like_other_memory(const T* argument) {
  asm("" : "+l"(argument));
  return argument;
}

// Hides from the compiler where a number comes from: no register keeps what is computed of it from
// one chunk to the next.
__device__ inline int computed_anew(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

#else

inline int computed_anew(int number) { return number; }

template <class T>
const T* like_other_memory(const T* argument) {
  return argument;
}

// The emulator's versions check the address, and count the bytes.
using emulator::load_global;
using emulator::store_global;

#endif

}  // namespace fusedopt::cuda
