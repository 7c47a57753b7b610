// Turns run-time values into types: the norm, and the variant of a rule.
#pragma once

#include <iterator>
#include <type_traits>

#include "core/decision.h"
#include "math/blocks.h"
#include "math/inline.h"
#include "math/norm.h"

namespace fusedopt {

// Calls body(SumOfSquares{}) or body(MaxAbs{}), and returns the body's result.
template <class Body>
FUSEDOPT_INLINE auto visit_norm(NormType type, Body&& body) {
  return type == NormType::kL2 ? body(SumOfSquares{}) : body(MaxAbs{});
}

// Calls body(std::integral_constant<unsigned, used>{}) for the rule's variant with these states.
template <class Rule, int k = 0, class Body>
FUSEDOPT_INLINE void visit_variant(unsigned states_used, Body&& body) {
  if constexpr (k < static_cast<int>(sizeof(Rule::kVariants) / sizeof(unsigned))) {
    constexpr unsigned kVariant = Rule::kVariants[k];
    if (states_used == kVariant) return body(std::integral_constant<unsigned, kVariant>{});
    visit_variant<Rule, k + 1>(states_used, body);
  }
}

// The states that every variant of the rule has.
template <class Rule>
constexpr unsigned always_used() {
  unsigned used = ~0u;
  for (const unsigned variant : Rule::kVariants) used &= variant;
  return used;
}

// The states of a variant that are stored as roots where they have 8 bits. None, if one of the
// variant's states can't have 8 bits.
template <class Rule>
constexpr unsigned roots_of(unsigned used) {
  unsigned roots = 0, k = 0;
  for (const auto& state : Rule::kStates) {
    const bool is_used = (used >> k & 1) != 0;
    if (is_used && state.coding == Coding::kNone) return 0;
    if (is_used && state.coding == Coding::kRoot) roots |= 1u << k;
    ++k;
  }
  return roots;
}

template <class Rule>
inline constexpr int num_states = std::size(Rule::kStates);
template <class Rule>
inline constexpr int num_scalars = std::size(Rule::kScalars);

// The length of an array with one element per state. It is at least 1, as C++ has no empty arrays.
template <class Rule>
inline constexpr int state_slots = num_states<Rule> > 0 ? num_states<Rule> : 1;

}  // namespace fusedopt
