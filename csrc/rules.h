// The optimizers, each one math header. A new one is listed here and nowhere else in C++.
#pragma once

#include "math/adam.h"
#include "math/rmsprop.h"

#define FUSEDOPT_FOR_EACH_RULE(DO) \
  DO(Adam)                         \
  DO(RMSprop)
