// Loaded into a Python process under callgrind: says between which calls to count instructions.
#include <malloc.h>
#include <valgrind/callgrind.h>

// From here on callgrind counts.
void instructions_begin(void) {
  malloc_trim(0);  // or the first step would tidy up the heap after whatever came before
  CALLGRIND_START_INSTRUMENTATION;
}

// Writes what was counted since the last call to the next of callgrind's files.
void instructions_dump(void) { CALLGRIND_DUMP_STATS; }
