#pragma once

namespace fusedopt::cpu {

// Whether this process was forked after the library was loaded. A forked child has none of its
// parent's threads, but GNU's OpenMP would wait for them forever.
bool in_forked_child();

}  // namespace fusedopt::cpu
