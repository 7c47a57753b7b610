// The formulas are inlined into every loop, of the host and of the device alike.
#pragma once

#if defined(__CUDACC__)
#define FUSEDOPT_INLINE __host__ __device__ __forceinline__
#else
#define FUSEDOPT_INLINE __attribute__((always_inline)) inline
#endif
