#include "simulate_tables.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace postquant::quantize {
namespace {

// The first code that gets the upper one of two levels, which gets what is equally near.
std::size_t FirstAbove(std::uint8_t lower, std::uint8_t upper) { return (std::size_t{lower} + upper + 1) / 2; }

}  // namespace

ChannelCodes CodesOf(const std::uint8_t* codes, std::size_t count) {
  ChannelCodes found{};
  found.steps = count - 1;
  for (std::size_t s = 0; s < kSimulatedLevels; ++s) {
    found.level[s] = static_cast<float>(codes[std::min(s, count - 1)]);
  }
  return found;
}

SimulatedLevels MakeLevels(const CodeGrid& grid, const std::uint8_t* codes, std::size_t channels, std::size_t count,
                           bool across, const LevelRoom& room) {
  SimulatedLevels made{};
  made.channels = channels;
  made.channel_step = across ? 1 : kSimulatedLevels;
  made.level_step = across ? channels : 1;
  made.steps = count - 1;
  made.low = grid.low;
  made.per_unit = grid.per_unit;
  for (std::size_t c = 0; c < channels; ++c) {
    const std::uint8_t* const own = codes + c * count;
    // The place of a code is one more.
    room.bottom[c] = static_cast<float>(own[0]) + 1.0F;
    room.top[c] = static_cast<float>(own[count - 1]) + 1.0F;
    for (std::size_t s = 0; s < kSimulatedLevels; ++s) {
      const std::size_t to = c * made.channel_step + s * made.level_step;
      room.level[to] = (static_cast<float>(own[std::min(s, count - 1)]) - grid.zero) * grid.step;
      room.first[to] = s < made.steps ? static_cast<float>(FirstAbove(own[s], own[s + 1]) + 1)
                                      : std::numeric_limits<float>::infinity();
    }
  }
  made.bottom = room.bottom;
  made.top = room.top;
  made.first = room.first;
  made.level = room.level;
  return made;
}

CodeGrid::CodeGrid(const float* levels, std::size_t count) {
  float least = levels[0];
  float high = levels[0];
  for (std::size_t i = 0; i < count; ++i) {
    least = levels[i] < least ? levels[i] : least;
    high = levels[i] > high ? levels[i] : high;
  }
  step = std::max((high - least) / 255.0F, kSmallestGap);
  zero = std::nearbyint(-least / step);
  low = -zero * step;
  per_unit = 1.0F / step;
}

void MapLevels(const std::uint8_t* levels, std::size_t count, bool all, LevelMap* map) {
  std::size_t steps = 0;
  std::size_t filled = 0;
  std::uint8_t code = levels[0];
  map->level[0] = map->reached[0] = code;
  for (std::size_t s = 1; s < count; ++s) {
    const std::uint8_t next = levels[s];
    if (next > code) {
      const std::size_t first = FirstAbove(code, next);
      if (all) {
        std::memset(map->level + filled, code, first - filled);
        filled = first;
      }
      map->below[steps] = static_cast<std::int8_t>(static_cast<std::int32_t>(first) - 1 - 128);
      map->reached[++steps] = next;
      code = next;
    }
  }
  if (all) {
    std::memset(map->level + filled, code, sizeof map->level - filled);
  }
  map->steps = static_cast<std::uint8_t>(steps);
  std::fill(map->below + steps, map->below + kMostSteps + 1, std::int8_t{127});
  std::fill(map->reached + steps + 1, map->reached + kMostSteps + 1, code);
}

}  // namespace postquant::quantize
