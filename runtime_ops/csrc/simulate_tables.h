// What codes mean to a channel, from its levels: the laws of calib/learn/level_codes.py, in float32.
#ifndef POSTQUANT_CSRC_SIMULATE_TABLES_H_
#define POSTQUANT_CSRC_SIMULATE_TABLES_H_

#include <cstddef>
#include <cstdint>

#include "quantize_kernels.h"

namespace postquant::quantize {

// The grid of codes of 8 bits that the levels of all channels are among.
struct CodeGrid {
  CodeGrid(const float* levels, std::size_t count);
  float step;
  float zero;
  float low;       // what code 0 stands for
  float per_unit;  // 1 / step
};

// codes: [count], those of one channel's levels on that grid.
ChannelCodes CodesOf(const std::uint8_t* codes, std::size_t count);

// Memory for SimulatedLevels of some channels, whose numbers follow each other channel by channel, or level by level
// where elements of all channels do.
struct LevelRoom {
  float* bottom;
  float* top;
  float* first;
  float* level;
};
// codes: [channels * count]
SimulatedLevels MakeLevels(const CodeGrid& grid, const std::uint8_t* codes, std::size_t channels, std::size_t count,
                           bool across, const LevelRoom& room);

// The nearest of sorted codes of levels to every code; of map->level the first element alone unless `all`.
void MapLevels(const std::uint8_t* levels, std::size_t count, bool all, LevelMap* map);

}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_SIMULATE_TABLES_H_
