// The names by which a rule finds its options in a param group.
#pragma once

namespace fusedopt {

struct HyperparameterName {
  const char* name;
  int count = 1;  // how many numbers it holds: `betas` is a pair
  // Null, or what is done with it on the host, as libm's functions differ on the device.
  double (*on_host)(double) = nullptr;
};

}  // namespace fusedopt
