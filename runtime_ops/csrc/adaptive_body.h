// The kernels of AdaptiveQuantize and AdaptiveRequantize: one text, compiled once per instruction set.
#ifndef POSTQUANT_CSRC_ADAPTIVE_BODY_H_
#define POSTQUANT_CSRC_ADAPTIVE_BODY_H_

#include "quantize_kernels.h"
#include "quantize_lanes.h"
#include "quantize_rounding.h"

namespace postquant::quantize {
namespace {

#if defined(POSTQUANT_LANES)
// Whole groups of elements; returns how many elements that were. Four sums, so that one addition need not wait for the
// one before it.
template <bool kSquares, bool kLargest>
std::size_t PoolGroups(const float* __restrict x, std::size_t count, Moments* out) {
  constexpr std::size_t kSums = 4;
  constexpr std::size_t kDoubles = Lanes::kLanes / 2;
  constexpr std::size_t kStep = kSums * kDoubles;
  Lanes::Doubles sum[kSums] = {};
  Lanes::Doubles squares[kSums] = {};
  Lanes::Floats largest[kSums / 2] = {};
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    for (std::size_t s = 0; s < kSums; ++s) {
      const Lanes::Doubles wide = Lanes::LoadDoubles(x + i + s * kDoubles);
      sum[s] = Lanes::AddDoubles(sum[s], wide);
      if (kSquares) {
        squares[s] = Lanes::AddSquares(squares[s], wide);
      }
    }
    for (std::size_t s = 0; kLargest && s < kSums / 2; ++s) {
      largest[s] = Lanes::Larger(largest[s], Lanes::Load(x + i + s * Lanes::kLanes));
    }
  }
  for (std::size_t s = 1; s < kSums; ++s) {
    sum[0] = Lanes::AddDoubles(sum[0], sum[s]);
    squares[0] = Lanes::AddDoubles(squares[0], squares[s]);
  }
  *out = {Lanes::Total(sum[0]), Lanes::Total(squares[0]),
          static_cast<double>(Lanes::Largest(Lanes::Larger(largest[0], largest[1])))};
  return i;
}
#else
template <bool kSquares, bool kLargest>
std::size_t PoolGroups(const float*, std::size_t, Moments* out) {
  *out = {0.0, 0.0, 0.0};
  return 0;
}
#endif

template <bool kSquares, bool kLargest>
void PoolFloat(const float* __restrict x, std::size_t count, Moments* out) {
  for (std::size_t i = PoolGroups<kSquares, kLargest>(x, count, out); i < count; ++i) {
    const double wide = static_cast<double>(x[i]);
    const double size = wide < 0.0 ? -wide : wide;
    out->sum += wide;
    out->squares += wide * wide;
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
  constexpr std::size_t kPart = 65536;  // 255 * 255 * 65536 < 2^32
  std::int64_t total = 0;
  std::int64_t total_squares = 0;
  std::int32_t least = 255;
  std::int32_t most = 0;
  for (std::size_t begin = 0; begin < count; begin += kPart) {
    const std::size_t size = count - begin < kPart ? count - begin : kPart;
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

#if defined(POSTQUANT_LANES)
// Whole groups of elements, multiplied with the reciprocal unless one of them is close to a tie; returns how many
// elements that were. Division would take most of the time.
std::size_t QuantizeGroups(const float* __restrict x, std::size_t count, float step, const CodeRange& range,
                           std::uint8_t* __restrict y) {
  const Limits limits(range);
  const Lanes::Floats low = Lanes::Set(limits.low);
  const Lanes::Floats high = Lanes::Set(limits.high);
  const Lanes::Floats reciprocal = Lanes::Set(1.0F / step);
  const Lanes::Floats far = Lanes::Set(0.5F - kNear);
  const std::size_t whole = HasReciprocal(step) ? count / kGroup * kGroup : 0;
  for (std::size_t begin = 0; begin < whole; begin += kGroup) {
    Lanes::Ints codes[kRegisters];
    Lanes::Floats farthest = {};
    for (std::size_t r = 0; r < kRegisters; ++r) {
      const Lanes::Floats ratio = Lanes::Multiply(Lanes::Load(x + begin + r * Lanes::kLanes), reciprocal);
      const Lanes::Floats limited = Lanes::Limited(ratio, low, high);
      codes[r] = Lanes::Nearest(limited);
      farthest = Lanes::Larger(farthest, Lanes::Subtract(limited, Lanes::Real(codes[r])));
    }
    Lanes::StoreBytes(codes, range.zero_point, y + begin);
    if (Lanes::AnyAbove(farthest, far)) {
      for (std::size_t i = begin; i < begin + kGroup; ++i) {
        y[i] = Divided(x[i], step, limits, range.zero_point);
      }
    }
  }
  return whole;
}
#else
std::size_t QuantizeGroups(const float*, std::size_t, float, const CodeRange&, std::uint8_t*) { return 0; }
#endif

void Quantize(const float* __restrict x, std::size_t count, float step, const CodeRange& range,
              std::uint8_t* __restrict y) {
  const Limits limits(range);
  const std::int32_t zero_point = range.zero_point;
  for (std::size_t i = QuantizeGroups(x, count, step, range, y); i < count; ++i) {
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
