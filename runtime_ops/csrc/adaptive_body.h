// The kernels of AdaptiveQuantize and AdaptiveRequantize: one text, compiled once per instruction set.
#ifndef POSTQUANT_CSRC_ADAPTIVE_BODY_H_
#define POSTQUANT_CSRC_ADAPTIVE_BODY_H_

#include "quantize_kernels.h"
#include "quantize_rounding.h"

namespace postquant::quantize {
namespace {

constexpr std::size_t kLanes = 32;  // independent sums, so that one addition need not wait for the one before it

template <bool kSquares, bool kLargest>
void PoolFloat(const float* __restrict x, std::size_t count, Moments* out) {
  double sum[kLanes] = {};
  double squares[kLanes] = {};
  float largest[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::size_t j = 0; j < kLanes; ++j) {
      const float value = x[i + j];
      const double wide = static_cast<double>(value);
      sum[j] += wide;
      if (kSquares) {
        squares[j] += wide * wide;
      }
      if (kLargest) {
        const float size = Magnitude(value);
        largest[j] = size > largest[j] ? size : largest[j];
      }
    }
  }
  for (std::size_t j = 0; i < count; ++i, ++j) {
    const float value = x[i];
    const double wide = static_cast<double>(value);
    const float size = Magnitude(value);
    sum[j] += wide;
    squares[j] += wide * wide;
    largest[j] = size > largest[j] ? size : largest[j];
  }
  *out = {0.0, 0.0, 0.0};
  for (std::size_t j = 0; j < kLanes; ++j) {
    const double size = static_cast<double>(largest[j]);
    out->sum += sum[j];
    out->squares += squares[j];
    out->largest = size > out->largest ? size : out->largest;
  }
}

void PoolAnyFloat(const float* __restrict x, std::size_t count, bool squares, bool largest, Moments* out) {
  if (squares) {
    largest ? PoolFloat<true, true>(x, count, out) : PoolFloat<true, false>(x, count, out);
  } else {
    largest ? PoolFloat<false, true>(x, count, out) : PoolFloat<false, false>(x, count, out);
  }
}

void PoolCodes(const std::uint8_t* __restrict x, std::size_t count, std::int32_t zero_point, Moments* out) {
  constexpr std::size_t kGroup = 65536;  // 255 * 255 * 65536 < 2^32
  std::int64_t total = 0;
  std::int64_t total_squares = 0;
  std::int32_t least = 255;
  std::int32_t most = 0;
  for (std::size_t begin = 0; begin < count; begin += kGroup) {
    const std::size_t size = count - begin < kGroup ? count - begin : kGroup;
    std::uint32_t sum = 0;
    std::uint32_t squares = 0;
    std::uint8_t low = 255;
    std::uint8_t high = 0;
    for (std::size_t i = 0; i < size; ++i) {
      const std::uint8_t code = x[begin + i];
      const std::uint32_t wide = code;
      sum += wide;
      squares += wide * wide;
      low = code < low ? code : low;
      high = code > high ? code : high;
    }
    total += sum;
    total_squares += squares;
    least = low < least ? low : least;
    most = high > most ? high : most;
  }
  const auto wide_count = static_cast<std::int64_t>(count);
  const std::int64_t zero = zero_point;
  out->sum = static_cast<double>(total - wide_count * zero);
  out->squares = static_cast<double>(total_squares - 2 * zero * total + wide_count * zero * zero);
  const std::int32_t above = most - zero_point;
  const std::int32_t below = zero_point - least;
  out->largest = count == 0 ? 0.0 : static_cast<double>(above > below ? above : below);
}

inline std::uint8_t Divided(float real, float step, const Limits& limits, std::int32_t zero_point) {
  return static_cast<std::uint8_t>(Rounded(Limited(real / step, limits.low, limits.high)) + zero_point);
}

inline std::uint8_t Multiplied(float real, float reciprocal, const Limits& limits, std::int32_t zero_point) {
  return static_cast<std::uint8_t>(Rounded(Limited(real * reciprocal, limits.low, limits.high)) + zero_point);
}

// A product with the reciprocal instead of the quotient is off by less than 3 * 2^-24 * 256, so it rounds to the same
// integer unless it is that close to a tie.
bool HasReciprocal(float step) { return step > 1e-37F && step < 1e37F; }

#if defined(__AVX512F__)
// Where division is what takes the time: blocks without a value close to a tie are multiplied.
std::size_t QuantizeBlocks(const float* __restrict x, std::size_t count, float step, const CodeRange& range,
                           std::uint8_t* __restrict y) {
  constexpr float kFarFromTie = 0.4999F;
  const Limits limits(range);
  const std::int32_t zero_point = range.zero_point;
  const float reciprocal = 1.0F / step;
  const std::size_t whole = HasReciprocal(step) ? count / kBlock * kBlock : 0;
  for (std::size_t begin = 0; begin < whole; begin += kBlock) {
    std::int32_t close = 0;
    for (std::size_t i = begin; i < begin + kBlock; ++i) {
      const float ratio = Limited(x[i] * reciprocal, limits.low, limits.high);
      const float shifted = ratio + kRounder;
      const float distance = Magnitude(ratio - (shifted - kRounder));
      close |= distance > kFarFromTie ? 1 : 0;
      y[i] = static_cast<std::uint8_t>(Bits(shifted) - kRounderBits + zero_point);
    }
    if (close != 0) {
      for (std::size_t i = begin; i < begin + kBlock; ++i) {
        y[i] = Divided(x[i], step, limits, zero_point);
      }
    }
  }
  return whole;
}
#else
std::size_t QuantizeBlocks(const float*, std::size_t, float, const CodeRange&, std::uint8_t*) { return 0; }
#endif

void Quantize(const float* __restrict x, std::size_t count, float step, const CodeRange& range,
              std::uint8_t* __restrict y) {
  const Limits limits(range);
  const std::int32_t zero_point = range.zero_point;
  for (std::size_t i = QuantizeBlocks(x, count, step, range, y); i < count; ++i) {
    y[i] = Divided(x[i], step, limits, zero_point);
  }
}

void Requantize(const std::uint8_t* __restrict x, std::size_t count, float x_scale, std::int32_t x_zero_point,
                float step, const CodeRange& range, std::uint8_t* __restrict y) {
  const Limits limits(range);
  const std::int32_t zero_point = range.zero_point;
  const float reciprocal = 1.0F / step;
  bool equal = HasReciprocal(step);  // and then whether multiplying does for all 256 codes
  for (std::int32_t code = 0; equal && code < 256; ++code) {
    const float real = static_cast<float>(code - x_zero_point) * x_scale;
    equal = Divided(real, step, limits, zero_point) == Multiplied(real, reciprocal, limits, zero_point);
  }
  if (equal) {
    for (std::size_t i = 0; i < count; ++i) {
      const float real = static_cast<float>(std::int32_t{x[i]} - x_zero_point) * x_scale;
      y[i] = Multiplied(real, reciprocal, limits, zero_point);
    }
  } else {
    for (std::size_t i = 0; i < count; ++i) {
      const float real = static_cast<float>(std::int32_t{x[i]} - x_zero_point) * x_scale;
      y[i] = Divided(real, step, limits, zero_point);
    }
  }
}

}  // namespace
}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_ADAPTIVE_BODY_H_
