// The list of rules: one header for each optimizer, and one for scaling alone. In C++, a new rule
// is listed only here.
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
