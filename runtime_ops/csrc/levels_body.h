// The kernel of LutRequantize: one text, compiled once per instruction set.
#ifndef POSTQUANT_CSRC_LEVELS_BODY_H_
#define POSTQUANT_CSRC_LEVELS_BODY_H_

#include "quantize_kernels.h"

namespace postquant::quantize {
namespace {

// Comparing bytes as signed numbers and adding what a level grows by is one instruction less per step than choosing
// among unsigned ones. All steps of an element are unrolled, so that compilers vectorise the loop over elements, whose
// length they have to know: bytes leave the rest of a vector, up to 63 elements, to a loop without.
template <std::size_t kSteps, std::size_t kCount>
void StepBlock(const std::uint8_t* __restrict x, const LevelMap& map, std::uint8_t* __restrict y) {
  for (std::size_t i = 0; i < kCount; ++i) {
    const auto code = static_cast<std::int8_t>(x[i] ^ 0x80);
    std::uint8_t level = map.level[0];
    for (std::size_t s = 0; s < kSteps; ++s) {
      level = static_cast<std::uint8_t>(level + (code > map.below[s] ? map.rise[s] : 0));
    }
    y[i] = level;
  }
}

template <std::size_t kSteps>
void StepBlocks(const std::uint8_t* __restrict x, std::size_t count, const LevelMap& map, std::uint8_t* __restrict y) {
  constexpr std::size_t kLong = 64;
  std::size_t i = 0;
  for (; i + kLong <= count; i += kLong) {
    StepBlock<kSteps, kLong>(x + i, map, y + i);
  }
  for (; i + kLevelBlock <= count; i += kLevelBlock) {
    StepBlock<kSteps, kLevelBlock>(x + i, map, y + i);
  }
  for (; i < count; ++i) {
    y[i] = map.level[x[i]];
  }
}

void Levels(const std::uint8_t* __restrict x, std::size_t count, const LevelMap& map, std::uint8_t* __restrict y) {
  if (map.steps <= 3) {
    StepBlocks<3>(x, count, map, y);
  } else if (map.steps <= 7) {
    StepBlocks<7>(x, count, map, y);
  } else {
    StepBlocks<kMostSteps>(x, count, map, y);
  }
}

}  // namespace
}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_LEVELS_BODY_H_
