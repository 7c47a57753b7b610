// The list of rules: one header for each optimizer, and one for scaling alone. In C++, a new rule
// is listed only here.
#pragma once

#include "rules/adadelta.h"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/adamax.h"
#include "rules/ademamix.h"
#include "rules/asgd.h"
#include "rules/cautious_adamw.h"
#include "rules/cautious_lion.h"
#include "rules/lamb.h"
#include "rules/lars.h"
#include "rules/lion.h"
#include "rules/muon.h"
#include "rules/nadam.h"
#include "rules/radam.h"
#include "rules/rmsprop.h"
#include "rules/rprop.h"
#include "rules/scale.h"
#include "rules/sgd.h"
#include "rules/stable_adamw.h"

#define FUSEDOPT_FOR_EACH_RULE(DO) \
  DO(Adadelta)                     \
  DO(Adagrad)                      \
  DO(Adam)                         \
  DO(Adamax)                       \
  DO(AdEMAMix)                     \
  DO(ASGD)                         \
  DO(CautiousAdamW)                \
  DO(CautiousLion)                 \
  DO(LAMB)                         \
  DO(LARS)                         \
  DO(Lion)                         \
  DO(Muon)                         \
  DO(NAdam)                        \
  DO(RAdam)                        \
  DO(RMSprop)                      \
  DO(Rprop)                        \
  DO(Scale)                        \
  DO(SGD)                          \
  DO(StableAdamW)
