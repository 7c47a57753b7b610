// Preloaded into a Python process: counts heap allocations and OpenMP regions between two calls.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define COUNTS_EXPORT __attribute__((visibility("default")))

static atomic_bool counting;
static atomic_long allocations, regions;

COUNTS_EXPORT void counts_start(void) {
  atomic_store(&allocations, 0);
  atomic_store(&regions, 0);
  atomic_store(&counting, true);
}

COUNTS_EXPORT void counts_stop(void) { atomic_store(&counting, false); }
COUNTS_EXPORT long counts_allocations(void) { return atomic_load(&allocations); }
COUNTS_EXPORT long counts_regions(void) { return atomic_load(&regions); }

static void note(atomic_long* counter) {
  if (atomic_load_explicit(&counting, memory_order_relaxed)) atomic_fetch_add(counter, 1);
}

// glibc's own functions under their other names: dlsym would itself allocate.
extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

COUNTS_EXPORT void* malloc(size_t size) {
  note(&allocations);
  return __libc_malloc(size);
}

COUNTS_EXPORT void* calloc(size_t count, size_t size) {
  note(&allocations);
  return __libc_calloc(count, size);
}

COUNTS_EXPORT void* realloc(void* old, size_t size) {
  note(&allocations);
  return __libc_realloc(old, size);
}

COUNTS_EXPORT void* memalign(size_t alignment, size_t size) {
  note(&allocations);
  return __libc_memalign(alignment, size);
}

COUNTS_EXPORT void* aligned_alloc(size_t alignment, size_t size) {
  return memalign(alignment, size);
}

COUNTS_EXPORT int posix_memalign(void** result, size_t alignment, size_t size) {
  *result = memalign(alignment, size);
  return *result == NULL ? ENOMEM : 0;
}

// What gcc makes of `#pragma omp parallel`.
typedef void Region(void (*body)(void*), void* data, unsigned threads, unsigned flags);

COUNTS_EXPORT void GOMP_parallel(void (*body)(void*), void* data, unsigned threads,
                                 unsigned flags) {
  static Region* _Atomic next;
  if (next == NULL) next = (Region*)dlsym(RTLD_NEXT, "GOMP_parallel");
  if (next == NULL) {  // a torch that doesn't load libgomp for all libraries to see
    next = (Region*)dlsym(dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD), "GOMP_parallel");
  }
  note(&regions);
  next(body, data, threads, flags);
}
