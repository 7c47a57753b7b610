// The message of a step over ranks in 32 bits: JAX has no integers of 64 bits by default.
#pragma once

#include <array>
#include <cstdint>

#include "ffi/tensors.h"

namespace fusedopt {

using Message = std::array<int64_t, FUSEDOPT_MESSAGE_SIZE>;

// A number is split into pieces of 16 bits, so that up to 32,767 ranks add up without an overflow.
inline constexpr int kPieces = 4, kPieceBits = 16;

inline void split(const Message& message, int32_t* pieces) {
  for (const int64_t number : message) {
    for (int k = 0; k < kPieces; ++k) *pieces++ = number >> (k * kPieceBits) & 0xffff;
  }
}

// Sums of pieces may be larger than a piece.
inline Message join(const int32_t* pieces) {
  Message message{};
  for (int64_t& number : message) {
    for (int k = 0; k < kPieces; ++k) number += int64_t{*pieces++} << (k * kPieceBits);
  }
  return message;
}

// A message in an operand, which has no elements if there is none.
class OptionalMessage {
 public:
  explicit OptionalMessage(const ffi::AnyBuffer& pieces) : given_(pieces.element_count() > 0) {
    if (given_) message_ = join(pieces.typed_data<int32_t>());
  }

  // Null if there is none.
  const int64_t* data() const { return given_ ? message_.data() : nullptr; }

 private:
  bool given_;
  Message message_{};
};

}  // namespace fusedopt
