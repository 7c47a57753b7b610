// The optimizers, each one math header. A new one is listed here and nowhere else in C++.
#pragma once

#include "math/adam.h"
#include "math/nadam.h"
#include "math/rmsprop.h"
#include "math/sgd.h"

#define FUSEDOPT_FOR_EACH_RULE(DO) \
  DO(Adam)                         \
  DO(NAdam)                        \
  DO(RMSprop)                      \
  DO(SGD)
