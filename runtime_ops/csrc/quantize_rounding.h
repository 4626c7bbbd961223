// Rounding and limits that compilers vectorise in loops over float32. Compiled once per instruction set, in an
// anonymous namespace, so that the linker cannot keep one copy, of any set, for all.
#ifndef POSTQUANT_CSRC_QUANTIZE_ROUNDING_H_
#define POSTQUANT_CSRC_QUANTIZE_ROUNDING_H_

#include <cstring>

#include "quantize_kernels.h"

namespace postquant::quantize {
namespace {

constexpr float kRounder = 12582912.0F;  // 1.5 * 2^23: adding it rounds |v| < 2^22 to an integer, half to even
constexpr std::int32_t kRounderBits = 0x4B400000;
constexpr std::size_t kBlock = 128;  // points whose sums stay in registers

inline std::int32_t Bits(float value) {
  std::int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float Magnitude(float value) { return value < 0.0F ? -value : value; }

inline std::int32_t Rounded(float value) { return Bits(value + kRounder) - kRounderBits; }

// Not a number becomes `low`.
inline float Limited(float value, float low, float high) {
  value = value > low ? value : low;
  return value < high ? value : high;
}

// A product with the reciprocal instead of the quotient is off by less than 3 * 2^-24 * 256 < kNear, once both are
// limited to codes: decisions about numbers farther than that apart are the same.
constexpr float kNear = 1e-4F;
inline bool HasReciprocal(float scale) { return scale > 1e-37F && scale < 1e37F; }

struct Limits {
  explicit Limits(const CodeRange& range)
      : low(static_cast<float>(range.low - range.zero_point)),
        high(static_cast<float>(range.high - range.zero_point)) {}
  float low;
  float high;
};

}  // namespace
}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_QUANTIZE_ROUNDING_H_
