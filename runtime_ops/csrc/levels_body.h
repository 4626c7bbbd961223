// The kernel of LutRequantize: one text, compiled once per instruction set.
#ifndef POSTQUANT_CSRC_LEVELS_BODY_H_
#define POSTQUANT_CSRC_LEVELS_BODY_H_

#include "quantize_kernels.h"
#include "quantize_lanes.h"

namespace postquant::quantize {
namespace {

#if defined(POSTQUANT_LANES)
constexpr bool kLooksUp = false;

// How many steps an element has passed, by a binary search in a register: 3, 7 or 15 at most.
template <std::size_t kSteps>
inline Lanes::Bytes SearchRegister(Lanes::Bytes x, Lanes::Bytes below, Lanes::Bytes reached) {
  const Lanes::Bytes code = Lanes::Signed(x);
  Lanes::Bytes passed = Lanes::SetByte(0);
  for (std::size_t half = (kSteps + 1) / 2; half > 0; half /= 2) {
    const auto middle = static_cast<std::int8_t>(half - 1);
    const Lanes::Bytes limit = Lanes::Choose(below, Lanes::AddBytes(passed, Lanes::SetByte(middle)));
    passed = Lanes::Raised(passed, code, limit, static_cast<std::int8_t>(half));
  }
  return Lanes::Choose(reached, passed);
}

template <std::size_t kSteps>
inline void SearchLevels(const std::uint8_t* __restrict x, std::size_t count, const LevelMap& map,
                         std::uint8_t* __restrict y) {
  const Lanes::Bytes below = Lanes::Sixteen(map.below);
  const Lanes::Bytes reached = Lanes::Sixteen(map.reached);
  std::size_t i = 0;
  for (; i + Lanes::kBytes <= count; i += Lanes::kBytes) {
    Lanes::StoreRow(y + i, SearchRegister<kSteps>(Lanes::LoadRow(x + i), below, reached));
  }
  if (i > 0 && i < count) {  // some elements once more
    i = count - Lanes::kBytes;
    Lanes::StoreRow(y + i, SearchRegister<kSteps>(Lanes::LoadRow(x + i), below, reached));
    i = count;
  }
  for (; i < count; ++i) {
    y[i] = map.level[x[i]];
  }
}
#else
constexpr bool kLooksUp = true;
#endif

// Compilers vectorise the loop over a block because its length and the number of steps are constants.
template <std::size_t kSteps, std::size_t kLength>
inline void CompareBlock(const std::uint8_t* __restrict x, const std::int8_t* below, const std::uint8_t* above,
                         std::uint8_t lowest, std::uint8_t* __restrict y) {
  for (std::size_t i = 0; i < kLength; ++i) {
    const auto code = static_cast<std::int8_t>(x[i] ^ 0x80);  // AVX2 compares signed bytes only
    std::uint8_t level = lowest;
    for (std::size_t s = 0; s < kSteps; ++s) {
      level = code > below[s] ? above[s] : level;
    }
    y[i] = level;
  }
}

template <std::size_t kSteps>
void LevelsOfSteps(const std::uint8_t* __restrict x, std::size_t count, const LevelMap& map,
                   std::uint8_t* __restrict y) {
  constexpr std::size_t kLong = 64;
  // Copies, which stay in registers: `map` might be what y changes.
  std::int8_t below[kSteps];
  std::uint8_t above[kSteps];
  const std::uint8_t lowest = map.level[0];
  for (std::size_t s = 0; s < kSteps; ++s) {
    below[s] = map.below[s];
    above[s] = map.reached[s + 1];
  }
  std::size_t i = 0;
  for (; i + kLong <= count; i += kLong) {
    CompareBlock<kSteps, kLong>(x + i, below, above, lowest, y + i);
  }
  for (; i + kFewestPoints <= count; i += kFewestPoints) {
    CompareBlock<kSteps, kFewestPoints>(x + i, below, above, lowest, y + i);
  }
  for (; i < count; ++i) {
    y[i] = map.level[x[i]];
  }
}

// More than 7 steps are too many to compare with: searched where there are registers for that, else looked up.
void Levels(const std::uint8_t* __restrict x, std::size_t count, const LevelMap& map, std::uint8_t* __restrict y) {
  if (map.steps <= 3) {
    LevelsOfSteps<3>(x, count, map, y);
  } else if (map.steps <= 7) {
    LevelsOfSteps<7>(x, count, map, y);
  } else {
#if defined(POSTQUANT_LANES)
    SearchLevels<kMostSteps>(x, count, map, y);
#else
    for (std::size_t i = 0; i < count; ++i) {
      y[i] = map.level[x[i]];
    }
#endif
  }
}

template <std::size_t kSteps, std::size_t kLength>
inline void AcrossBlock(const std::uint8_t* __restrict x, const LevelRows& rows, std::size_t channel,
                        std::uint8_t* __restrict y) {
  const std::size_t stride = rows.channels;
  const std::uint8_t* const lowest = rows.lowest + channel;
  const std::int8_t* const below = rows.below + channel;
  const std::uint8_t* const above = rows.above + channel;
  for (std::size_t i = 0; i < kLength; ++i) {
    const auto code = static_cast<std::int8_t>(x[channel + i] ^ 0x80);
    std::uint8_t level = lowest[i];
    for (std::size_t s = 0; s < kSteps; ++s) {
      const std::uint8_t higher = above[s * stride + i];
      level = code > below[s * stride + i] ? higher : level;
    }
    y[channel + i] = level;
  }
}

template <std::size_t kSteps>
void AcrossOfSteps(const std::uint8_t* __restrict x, std::size_t count, const LevelRows& rows,
                   std::uint8_t* __restrict y) {
  constexpr std::size_t kLong = 64;
  for (std::size_t row = 0; row < count; ++row, x += rows.channels, y += rows.channels) {
    std::size_t channel = 0;
    for (; channel + kLong <= rows.channels; channel += kLong) {
      AcrossBlock<kSteps, kLong>(x, rows, channel, y);
    }
    for (; channel + kFewestPoints <= rows.channels; channel += kFewestPoints) {
      AcrossBlock<kSteps, kFewestPoints>(x, rows, channel, y);
    }
    if (channel < rows.channels) {  // some channels once more
      AcrossBlock<kSteps, kFewestPoints>(x, rows, rows.channels - kFewestPoints, y);
    }
  }
}

void LevelsAcross(const std::uint8_t* __restrict x, std::size_t count, const LevelRows& rows,
                  std::uint8_t* __restrict y) {
  if (rows.steps <= 3) {
    AcrossOfSteps<3>(x, count, rows, y);
  } else if (rows.steps <= 7) {
    AcrossOfSteps<7>(x, count, rows, y);
  } else {
    AcrossOfSteps<kMostSteps>(x, count, rows, y);
  }
}

}  // namespace
}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_LEVELS_BODY_H_
