// The optimizers, each one math header, and clipping by itself. A new one is listed here and
// nowhere else in C++.
#pragma once

#include "math/adam.h"
#include "math/clip_grads.h"
#include "math/nadam.h"
#include "math/rmsprop.h"
#include "math/sgd.h"

#define FUSEDOPT_FOR_EACH_RULE(DO) \
  DO(Adam)                         \
  DO(ClipGrads)                    \
  DO(NAdam)                        \
  DO(RMSprop)                      \
  DO(SGD)
