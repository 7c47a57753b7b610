// The CUDA sources as they ship, for the host's compiler.
#include "../../csrc/cuda/passes.cu"

// For tests, by way of ctypes: how many kernels have been launched so far.
extern "C" __attribute__((visibility("default"))) unsigned long long fusedopt_emulator_launches() {
  return emulator::launches();
}
