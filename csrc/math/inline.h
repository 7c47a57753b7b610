// FUSEDOPT_INLINE: inlines the formulas into every loop, on the host and on the device.
#pragma once

#if defined(__CUDACC__)
#define FUSEDOPT_INLINE __host__ __device__ __forceinline__
#else
#define FUSEDOPT_INLINE __attribute__((always_inline)) inline
#endif

// Exports a symbol from the kernels' library. All other symbols are hidden.
#if !defined(FUSEDOPT_API)
#define FUSEDOPT_API __attribute__((visibility("default")))
#endif
