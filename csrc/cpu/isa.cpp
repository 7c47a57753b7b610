#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace fusedopt::cpu {

namespace {

Isa detect() {
#if FUSEDOPT_X86_ISAS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Isa found = avx2 && avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
  // Tests select a lower instruction set than the processor's by name.
  const char* limit = std::getenv("FUSEDOPT_ISA");
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2}) {
    if (limit != nullptr && std::strcmp(limit, isa_name(isa)) == 0 && isa < found) return isa;
  }
  return found;
#else
  return Isa::kBaseline;
#endif
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kBaseline:
      return "baseline";
  }
  return "";
}

}  // namespace fusedopt::cpu
