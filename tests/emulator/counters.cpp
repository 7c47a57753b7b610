// For tests, by way of ctypes: how many kernels have been launched so far, and how many bytes of
// the tensors the n-th of them loaded and stored.
#include "cuda_runtime.h"

extern "C" {
__attribute__((visibility("default"))) unsigned long long fusedopt_emulator_launches() {
  return emulator::launches();
}
__attribute__((visibility("default"))) void fusedopt_emulator_traffic(unsigned long long launch,
                                                                      unsigned long long* bytes) {
  const auto traffic = emulator::grid.traffic(launch);
  bytes[0] = traffic.loaded;
  bytes[1] = traffic.stored;
}
}
