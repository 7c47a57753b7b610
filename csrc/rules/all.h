// The optimizers, each one math header, and clipping by itself. A new one is listed here and
// nowhere else in C++.
#pragma once

#include "rules/adam.h"
#include "rules/nadam.h"
#include "rules/rmsprop.h"
#include "rules/scale.h"
#include "rules/sgd.h"

#define FUSEDOPT_FOR_EACH_RULE(DO) \
  DO(Adam)                         \
  DO(ClipGrads)                    \
  DO(NAdam)                        \
  DO(RMSprop)                      \
  DO(SGD)
