// For tests, by way of ctypes: how many kernels have been launched so far.
#include "cuda_runtime.h"

extern "C" __attribute__((visibility("default"))) unsigned long long fusedopt_emulator_launches() {
  return emulator::launches();
}
