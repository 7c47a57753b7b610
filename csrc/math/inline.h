// FUSEDOPT_INLINE: the formulas are inlined into every loop, of the host and of the device alike.
#pragma once

#if defined(__CUDACC__)
#define FUSEDOPT_INLINE __host__ __device__ __forceinline__
#else
#define FUSEDOPT_INLINE __attribute__((always_inline)) inline
#endif

// What the kernels' library shows to those that link to it. Everything else is hidden.
#if !defined(FUSEDOPT_API)
#define FUSEDOPT_API __attribute__((visibility("default")))
#endif
