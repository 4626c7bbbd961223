// Levels of codes, for all 256 of them: what LutRequantize and FeedbackRequantize share.
#ifndef POSTQUANT_CSRC_LEVEL_MAPS_H_
#define POSTQUANT_CSRC_LEVEL_MAPS_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "node.h"
#include "quantize_kernels.h"
#include "side_inputs.h"

namespace postquant {

constexpr std::size_t kCodes = 256;
using LevelCodes = std::array<std::uint8_t, kCodes>;

// The first inputs of both.
enum LevelInput : std::size_t {
  kLevelX,
  kLevelXScale,
  kLevelXZeroPoint,
  kLevelScale,
  kLevelZeroPoint,
  kLevelTable,
  kLevelInputs
};

// OperatorError if one of the inputs beside x breaks its contract.
void CheckLevels(const Identity& identity, const Tensors& inputs);

// The same if x has not so many channels (any number of them for `channels` of 1) with `behind` axes behind theirs.
void CheckChannels(const Identity& identity, const Tensor& x, std::size_t channels, std::size_t behind);

// The code on the levels' grid of every code of x.
LevelCodes CodesOfLevels(const quantize::Kernels& kernels, const Tensors& inputs);

// The nearest of sorted levels to each of kCodes sorted codes, the upper one of two that are equally near, and the
// steps between them.
void MakeMap(const std::uint8_t* levels, std::size_t count, const std::uint8_t* codes, quantize::LevelMap* map);

}  // namespace postquant

#endif  // POSTQUANT_CSRC_LEVEL_MAPS_H_
