#include "level_maps.h"

#include <algorithm>
#include <string>

namespace postquant {
namespace {

constexpr std::int64_t kFewestLevels = 2;
constexpr std::int64_t kMostLevels = quantize::kMostSteps + 1;

}  // namespace

void CheckLevels(const Identity& identity, const Tensors& inputs) {
  for (const LevelInput input : {kLevelXScale, kLevelXZeroPoint, kLevelScale, kLevelZeroPoint}) {
    identity.ExpectShape(inputs[input], input, {});
  }
  identity.ExpectScales(inputs[kLevelXScale], kLevelXScale);
  identity.ExpectScales(inputs[kLevelScale], kLevelScale);
  const Shape& shape = inputs[kLevelTable].shape;
  if (shape.rank() != 2 || shape[0] < 1 || shape[1] < kFewestLevels || shape[1] > kMostLevels) {
    identity.FailInput(kLevelTable, "has shape " + shape.Text() + ", expected at least 1 row of " +
                                        std::to_string(kFewestLevels) + " to " + std::to_string(kMostLevels) +
                                        " levels");
  }
  const auto* const levels = inputs[kLevelTable].As<std::uint8_t>();
  const auto rows = static_cast<std::size_t>(shape[0]);
  const auto count = static_cast<std::size_t>(shape[1]);
  for (std::size_t row = 0; row < rows; ++row) {
    if (!std::is_sorted(levels + row * count, levels + (row + 1) * count)) {
      identity.FailInput(kLevelTable, "has levels that are not sorted in row " + std::to_string(row));
    }
  }
}

void CheckChannels(const Identity& identity, const Tensor& x, std::size_t channels, std::size_t behind) {
  const std::size_t rank = x.shape.rank();
  if (rank == 0) {
    identity.FailInput(kLevelX, "has shape [], expected one axis or more");
  }
  const bool fits = behind < rank && static_cast<std::size_t>(x.shape[rank - 1 - behind]) == channels;
  if (channels != 1 && !fits) {
    identity.FailInput(kLevelX, "has shape " + x.shape.Text() + ", expected " + std::to_string(channels) +
                                    " channels on axis -" + std::to_string(behind + 1));
  }
}

LevelCodes CodesOfLevels(const quantize::Kernels& kernels, const Tensors& inputs) {
  LevelCodes all;
  LevelCodes codes;
  for (std::size_t i = 0; i < kCodes; ++i) {
    all[i] = static_cast<std::uint8_t>(i);
  }
  kernels.requantize(all.data(), kCodes, *inputs[kLevelXScale].As<float>(),
                     *inputs[kLevelXZeroPoint].As<std::uint8_t>(), *inputs[kLevelScale].As<float>(),
                     {*inputs[kLevelZeroPoint].As<std::uint8_t>(), 0, 255}, codes.data());
  return codes;
}

void MakeMap(const std::uint8_t* levels, std::size_t count, const std::uint8_t* codes, quantize::LevelMap* map) {
  std::size_t nearest = 0;
  std::size_t steps = 0;
  for (std::size_t i = 0; i < kCodes; ++i) {
    while (nearest + 1 < count && levels[nearest] + levels[nearest + 1] <= 2 * codes[i]) {
      ++nearest;
    }
    map->level[i] = levels[nearest];
    if (i == 0) {
      map->reached[0] = map->level[0];
    } else if (map->level[i] != map->level[i - 1]) {
      map->below[steps] = static_cast<std::int8_t>(static_cast<std::int32_t>(i) - 1 - 128);
      map->reached[++steps] = map->level[i];
    }
  }
  map->steps = static_cast<std::uint8_t>(steps);
  std::fill(map->below + steps, map->below + quantize::kMostSteps + 1, std::int8_t{127});
  std::fill(map->reached + steps + 1, map->reached + quantize::kMostSteps + 1, map->level[kCodes - 1]);
}

}  // namespace postquant
