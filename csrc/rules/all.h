// The rules: optimizers, a header each, and scaling by itself. A new rule is listed here and
// nowhere else in C++.
#pragma once

#include "rules/adam.h"
#include "rules/nadam.h"
#include "rules/rmsprop.h"
#include "rules/scale.h"
#include "rules/sgd.h"

#define FUSEDOPT_FOR_EACH_RULE(DO) \
  DO(Adam)                         \
  DO(NAdam)                        \
  DO(RMSprop)                      \
  DO(Scale)                        \
  DO(SGD)
