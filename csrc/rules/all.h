// The list of rules: one header for each optimizer, and one for scaling alone. In C++, a new rule
// is listed only here.
#pragma once

#include "rules/adadelta.h"
#include "rules/adam.h"
#include "rules/adamax.h"
#include "rules/nadam.h"
#include "rules/radam.h"
#include "rules/rmsprop.h"
#include "rules/scale.h"
#include "rules/sgd.h"

#define FUSEDOPT_FOR_EACH_RULE(DO) \
  DO(Adadelta)                     \
  DO(Adam)                         \
  DO(Adamax)                       \
  DO(NAdam)                        \
  DO(RAdam)                        \
  DO(RMSprop)                      \
  DO(Scale)                        \
  DO(SGD)
