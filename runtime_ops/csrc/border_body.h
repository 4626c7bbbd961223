// The kernels of BorderQuantize: one text, compiled once per instruction set.
#ifndef POSTQUANT_CSRC_BORDER_BODY_H_
#define POSTQUANT_CSRC_BORDER_BODY_H_

#include <cstring>

#include "quantize_kernels.h"
#include "quantize_lanes.h"
#include "quantize_rounding.h"

namespace postquant::quantize {
namespace {

inline std::int32_t Below(float value) {
  const auto cut = static_cast<std::int32_t>(value);
  return cut - (value < static_cast<float>(cut) ? 1 : 0);
}

// floor(ratio), plus 1 if its fraction is above the border.
inline std::uint8_t Code(float ratio, std::int32_t below, float border, std::int32_t zero_point) {
  const float fraction = ratio - static_cast<float>(below);
  const float positive = border > 0.0F ? border : 0.0F;
  return static_cast<std::uint8_t>(below + zero_point + (fraction > positive ? 1 : 0));
}

#if defined(POSTQUANT_LANES)
// Where the border of a value comes from: one number, a table in registers, a table in memory.
enum class Levels { kOne, kFew, kMany };

inline Levels LevelsOf(const ChannelBorder& border) {
  return border.levels == 1 ? Levels::kOne : border.levels <= Lanes::kSmallTable ? Levels::kFew : Levels::kMany;
}

// Borders by integer part; `first` is the place of 0 in the table.
template <Levels kLevels>
class BorderTable {
 public:
  BorderTable(const ChannelBorder& border, std::int32_t first)
      : memory_(border.table), first_(first), one_(Lanes::Set(border.table[0])), few_() {
    if (kLevels == Levels::kFew) {
      float turned[Lanes::kSmallTable] = {};  // found by the low bits of an integer part, whatever its sign
      for (std::int32_t i = 0; i < border.levels; ++i) {
        turned[(i - first) & (Lanes::kSmallTable - 1)] = border.table[i];
      }
      few_ = Lanes::LoadTable(turned);
    }
  }

  Lanes::Floats At(Lanes::Ints below) const {
    return kLevels == Levels::kOne   ? one_
           : kLevels == Levels::kFew ? Lanes::LookUp(below, few_)
                                     : Lanes::Gather(below, first_, memory_);
  }

 private:
  const float* memory_;
  std::int32_t first_;
  Lanes::Floats one_;
  Lanes::Table few_;
};

// Whether a quotient on the wrong side of an integer gives the same code: no border is close to 0 or 1.
inline bool IsInside(const ChannelBorder& border) {
  bool inside = true;
  for (std::int32_t i = 0; i < border.levels; ++i) {
    inside = inside && border.table[i] > kNear && border.table[i] < 1.0F - kNear;
  }
  return inside;
}
#endif

inline void BorderEach(const float* __restrict x, std::size_t count, float scale, const CodeRange& range,
                       const ChannelBorder& border, std::uint8_t* __restrict y) {
  const Limits limits(range);
  const std::int32_t first = range.zero_point - range.low;
  for (std::size_t i = 0; i < count; ++i) {
    const float ratio = Limited(x[i] / scale, limits.low, limits.high);
    const std::int32_t below = Below(ratio);
    y[i] = Code(ratio, below, border.table[border.levels == 1 ? 0 : below + first], range.zero_point);
  }
}

#if defined(POSTQUANT_LANES)
// Whole groups of elements, multiplied with the reciprocal unless a fraction is close to its border; returns how many
// elements that were.
template <Levels kLevels>
std::size_t BorderGroups(const float* __restrict x, std::size_t count, float scale, const CodeRange& range,
                         const ChannelBorder& border, std::uint8_t* __restrict y) {
  const Limits limits(range);
  const BorderTable<kLevels> table(border, range.zero_point - range.low);
  const Lanes::Floats low = Lanes::Set(limits.low);
  const Lanes::Floats high = Lanes::Set(limits.high);
  const Lanes::Floats reciprocal = Lanes::Set(1.0F / scale);
  const Lanes::Floats near = Lanes::Set(kNear);
  const std::size_t whole = HasReciprocal(scale) && IsInside(border) ? count / kGroup * kGroup : 0;
  for (std::size_t begin = 0; begin < whole; begin += kGroup) {
    Lanes::Ints codes[kRegisters];
    Lanes::Floats nearest = Lanes::Set(1.0F);
    for (std::size_t r = 0; r < kRegisters; ++r) {
      const Lanes::Floats ratio = Lanes::Multiply(Lanes::Load(x + begin + r * Lanes::kLanes), reciprocal);
      const Lanes::Floats limited = Lanes::Limited(ratio, low, high);
      const Lanes::Ints below = Lanes::Below(limited);
      const Lanes::Floats fraction = Lanes::Subtract(limited, Lanes::Real(below));
      const Lanes::Floats limit = table.At(below);
      nearest = Lanes::Smaller(nearest, Lanes::Subtract(fraction, limit));
      codes[r] = Lanes::Raised(below, fraction, limit);
    }
    Lanes::StoreBytes(codes, range.zero_point, y + begin);
    if (Lanes::AnyBelow(nearest, near)) {
      BorderEach(x + begin, kGroup, scale, range, border, y + begin);
    }
  }
  return whole;
}
#endif

void Border(const float* __restrict x, std::size_t count, float scale, const CodeRange& range,
            const ChannelBorder& border, std::uint8_t* __restrict y) {
  std::size_t done = 0;
#if defined(POSTQUANT_LANES)
  switch (LevelsOf(border)) {
    case Levels::kOne:
      done = BorderGroups<Levels::kOne>(x, count, scale, range, border, y);
      break;
    case Levels::kFew:
      done = BorderGroups<Levels::kFew>(x, count, scale, range, border, y);
      break;
    case Levels::kMany:
      done = BorderGroups<Levels::kMany>(x, count, scale, range, border, y);
      break;
  }
#endif
  BorderEach(x + done, count - done, scale, range, border, y + done);
}

void Residual(const float* __restrict x, std::size_t count, float scale, const CodeRange& range,
              float* __restrict ratios, std::int16_t* __restrict residual) {
  const Limits limits(range);
  for (std::size_t i = 0; i < count; ++i) {
    const float ratio = Limited(x[i] / scale, limits.low, limits.high);
    const float nearest = (ratio + kRounder) - kRounder;
    ratios[i] = ratio;
    residual[i] = static_cast<std::int16_t>(Rounded((nearest - ratio) * 128.0F));
  }
}

inline void CopyGroups(const std::int16_t* __restrict from, std::size_t count, std::int16_t* __restrict to) {
  for (std::size_t i = 0; i < count; i += kPadding) {
    std::memcpy(to + i, from + i, kPadding * sizeof(std::int16_t));
  }
}

// A row is copied in whole groups; what that spoils of the next one is written again.
void SpreadRows(const std::int16_t* __restrict from, std::size_t width, std::size_t rows, std::size_t stride,
                std::int16_t* __restrict to) {
  for (std::size_t row = 0; row + 1 < rows; ++row) {
    std::int16_t* const begin = to + row * stride;
    CopyGroups(from + row * width, width, begin);
    for (std::size_t i = width; i < stride; ++i) {
      begin[i] = 0;
    }
  }
  std::memcpy(to + (rows - 1) * stride, from + (rows - 1) * width, width * sizeof(std::int16_t));
}

void GatherRows(const std::int16_t* __restrict from, std::size_t width, std::size_t rows, std::size_t stride,
                std::int16_t* __restrict to) {
  for (std::size_t row = 0; row < rows; ++row) {
    CopyGroups(from + row * stride, width, to + row * width);
  }
}

template <std::size_t kSize>
inline void WindowBlock(const std::int16_t* __restrict residual, std::size_t stride, const std::int8_t* weights,
                        std::size_t rows, std::size_t columns, std::int16_t* __restrict sums) {
  std::uint16_t block[kSize] = {};  // unsigned: sums wrap around on the way, never in the end
  for (std::size_t i = 0; i < rows; ++i) {
    for (std::size_t j = 0; j < columns; ++j) {
      const std::uint32_t weight = static_cast<std::uint32_t>(weights[i * columns + j]);
      const std::int16_t* const from = residual + i * stride + j;
      for (std::size_t k = 0; k < kSize; ++k) {
        block[k] = static_cast<std::uint16_t>(block[k] + weight * static_cast<std::uint32_t>(from[k]));
      }
    }
  }
  std::memcpy(sums, block, sizeof block);
}

void Window(const std::int16_t* __restrict residual, std::size_t stride, const std::int8_t* weights, std::size_t rows,
            std::size_t columns, std::size_t count, std::int16_t* __restrict sums) {
  std::size_t p = 0;
  for (; p + kBlock <= count; p += kBlock) {
    WindowBlock<kBlock>(residual + p, stride, weights, rows, columns, sums + p);
  }
  for (; p < count; p += kPadding) {
    WindowBlock<kPadding>(residual + p, stride, weights, rows, columns, sums + p);
  }
}

#if defined(POSTQUANT_LANES)
// Whole groups of elements; returns how many elements that were.
template <Levels kLevels, bool kWindow, bool kAcross>
std::size_t DecideGroups(const float* __restrict ratios, std::size_t count, const CodeRange& range,
                         const ChannelBorder& border, const Neighbours& neighbours, std::uint8_t* __restrict y) {
  const BorderTable<kLevels> table(border, range.zero_point - range.low);
  const Lanes::Floats window_scale = Lanes::Set(border.window_scale);
  const Lanes::Floats across_scale = Lanes::Set(border.across_scale);
  const std::size_t whole = count / kGroup * kGroup;
  for (std::size_t begin = 0; begin < whole; begin += kGroup) {
    Lanes::Ints codes[kRegisters];
    for (std::size_t r = 0; r < kRegisters; ++r) {
      const std::size_t i = begin + r * Lanes::kLanes;
      const Lanes::Floats ratio = Lanes::Load(ratios + i);
      const Lanes::Ints below = Lanes::Below(ratio);
      Lanes::Floats limit = table.At(below);
      if (kWindow) {
        limit = Lanes::Add(limit, Lanes::Multiply(Lanes::LoadShort(neighbours.window + i), window_scale));
      }
      if (kAcross) {
        limit = Lanes::Add(limit, Lanes::Multiply(Lanes::Load(neighbours.across + i), across_scale));
      }
      codes[r] = Lanes::Raised(below, Lanes::Subtract(ratio, Lanes::Real(below)), Lanes::AtLeastZero(limit));
    }
    Lanes::StoreBytes(codes, range.zero_point, y + begin);
  }
  return whole;
}

template <Levels kLevels>
std::size_t DecideWith(const float* __restrict ratios, std::size_t count, const CodeRange& range,
                       const ChannelBorder& border, const Neighbours& neighbours, std::uint8_t* __restrict y) {
  if (neighbours.window == nullptr) {
    return DecideGroups<kLevels, false, true>(ratios, count, range, border, neighbours, y);
  }
  return neighbours.across == nullptr
             ? DecideGroups<kLevels, true, false>(ratios, count, range, border, neighbours, y)
             : DecideGroups<kLevels, true, true>(ratios, count, range, border, neighbours, y);
}
#endif

void Decide(const float* __restrict ratios, std::size_t count, const CodeRange& range, const ChannelBorder& border,
            const Neighbours& neighbours, std::uint8_t* __restrict y) {
  const std::int32_t first = range.zero_point - range.low;
  std::size_t i = 0;
#if defined(POSTQUANT_LANES)
  switch (LevelsOf(border)) {
    case Levels::kOne:
      i = DecideWith<Levels::kOne>(ratios, count, range, border, neighbours, y);
      break;
    case Levels::kFew:
      i = DecideWith<Levels::kFew>(ratios, count, range, border, neighbours, y);
      break;
    case Levels::kMany:
      i = DecideWith<Levels::kMany>(ratios, count, range, border, neighbours, y);
      break;
  }
#endif
  for (; i < count; ++i) {
    const std::int32_t below = Below(ratios[i]);
    float limit = border.table[border.levels == 1 ? 0 : below + first];
    if (neighbours.window != nullptr) {
      limit += static_cast<float>(neighbours.window[i]) * border.window_scale;
    }
    if (neighbours.across != nullptr) {
      limit += neighbours.across[i] * border.across_scale;
    }
    y[i] = Code(ratios[i], below, limit, range.zero_point);
  }
}

}  // namespace
}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_BORDER_BODY_H_
