// Compiles one source for several instruction sets. The best one that the processor has is chosen
// at run time.
#pragma once

// -DFUSEDOPT_ONE_ISA compiles the baseline only. The emulator's build uses it, as it needs no
// speed.
#if defined(__x86_64__) && !defined(FUSEDOPT_ONE_ISA)
#define FUSEDOPT_X86_ISAS 1
#else
#define FUSEDOPT_X86_ISAS 0
#endif

namespace fusedopt::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa best_isa();
const char* isa_name(Isa isa);

// Each of these functions calls Kernel::run(arguments...), which is always inlined, so that it is
// compiled for each instruction set. The whole build disables contraction into FMA: all of them
// give the same bits.
template <class Kernel, class... Arguments>
void run_baseline(Arguments... arguments) {
  Kernel::run(arguments...);
}

#if FUSEDOPT_X86_ISAS
template <class Kernel, class... Arguments>
__attribute__((target("avx2,f16c,fma,bmi2"))) void run_avx2(Arguments... arguments) {
  Kernel::run(arguments...);
}

template <class Kernel, class... Arguments>
__attribute__((
    target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,fma,bmi2,"
           "prefer-vector-width=512"))) void
run_avx512(Arguments... arguments) {
  Kernel::run(arguments...);
}
#endif

template <class Kernel, class... Arguments>
void run_best([[maybe_unused]] Isa isa, Arguments... arguments) {
#if FUSEDOPT_X86_ISAS
  if (isa == Isa::kAvx512) return run_avx512<Kernel>(arguments...);
  if (isa == Isa::kAvx2) return run_avx2<Kernel>(arguments...);
#endif
  run_baseline<Kernel>(arguments...);
}

}  // namespace fusedopt::cpu
