#include "simulate_tables.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace postquant::quantize {
namespace {

// Not a number becomes `low`.
float Within(float value, float low, float high) {
  value = value > low ? value : low;
  return value < high ? value : high;
}

// The smallest integer that is not below a number from 0 to kMostCells.
std::size_t Above(float value) {
  const auto whole = static_cast<std::size_t>(value);
  return static_cast<float>(whole) < value ? whole + 1 : whole;
}

}  // namespace

void MakePositions(std::size_t cells, float* position) {
  for (std::size_t cell = 0; cell <= cells; ++cell) {
    position[cell] = static_cast<float>(cell) / static_cast<float>(cells);
  }
}

LevelGrid::LevelGrid(const float* levels, std::size_t count, std::size_t cells, const float* position)
    : levels_(levels), count_(count), cells_(cells), position_(position), span_(levels[count - 1] - levels[0]) {
  const auto all = static_cast<float>(cells);
  // In this order, as torch divides a number by a tensor.
  per_unit_ = (1.0F / std::max(span_, kSmallestGap)) * all;
  for (std::size_t s = 0; s < count; ++s) {
    first_[s] = Above(Within((levels[s] - levels[0]) * per_unit_, 0.0F, all));
  }
}

float LevelGrid::Share(std::size_t cell, std::size_t s) const {
  const float place = position_[cell] * span_ + levels_[0];
  const float below = levels_[s];
  return Within((place - below) / std::max(levels_[s + 1] - below, kSmallestGap), 0.0F, 1.0F);
}

std::size_t LevelGrid::FirstAbove(std::size_t s) const {
  const std::size_t begin = first(s);
  const std::size_t end = first(s + 1);
  // Shares never fall: a guess is at most some cells away.
  const float middle = (levels_[s] - levels_[0] + (levels_[s + 1] - levels_[0])) * 0.5F * per_unit_;
  std::size_t cell = Above(Within(middle, 0.0F, static_cast<float>(cells_)));
  cell = std::min(std::max(cell, begin), std::max(begin, end));
  while (cell > begin && Share(cell - 1, s) >= 0.5F) {
    --cell;
  }
  while (cell < end && Share(cell, s) < 0.5F) {
    ++cell;
  }
  return cell;
}

CellGrid LevelGrid::Cells() const {
  CellGrid grid{};
  grid.cells = cells_;
  grid.position = position_;
  grid.span = span_;
  grid.steps = count_ - 1;
  for (std::size_t s = 0; s < kSimulatedLevels; ++s) {
    grid.level[s] = levels_[std::min(s, count_ - 1)];
    grid.first[s] = s + 1 < count_ ? static_cast<float>(first_[s]) : std::numeric_limits<float>::infinity();
  }
  return grid;
}

SimulatedLevels MakeLevels(const float* levels, std::size_t channels, std::size_t count, std::size_t cells,
                           bool across, const LevelRoom& room) {
  SimulatedLevels made{};
  made.channels = channels;
  made.channel_step = across ? 1 : kSimulatedLevels;
  made.level_step = across ? channels : 1;
  made.steps = count - 1;
  made.last = static_cast<float>(cells + 2);
  for (std::size_t c = 0; c < channels; ++c) {
    const LevelGrid grid(levels + c * count, count, cells, room.position);
    room.low[c] = grid.low();
    room.per_unit[c] = grid.per_unit();
    for (std::size_t s = 0; s < kSimulatedLevels; ++s) {
      const std::size_t to = c * made.channel_step + s * made.level_step;
      room.level[to] = levels[c * count + std::min(s, count - 1)];
      // Behind the cells, at place cells + 2, everything gets the last level.
      room.first[to] = s < made.steps ? static_cast<float>(grid.FirstAbove(s) + 1)
                                      : std::numeric_limits<float>::infinity();
    }
  }
  made.low = room.low;
  made.per_unit = room.per_unit;
  made.first = room.first;
  made.level = room.level;
  return made;
}

CodeGrid::CodeGrid(const float* levels, std::size_t count) {
  float low = levels[0];
  float high = levels[0];
  for (std::size_t i = 0; i < count; ++i) {
    low = levels[i] < low ? levels[i] : low;
    high = levels[i] > high ? levels[i] : high;
  }
  step = std::max((high - low) / 255.0F, kSmallestGap);
  zero = std::nearbyint(-low / step);
}

void MapLevels(const std::uint8_t* levels, std::size_t count, bool all, LevelMap* map) {
  std::size_t steps = 0;
  std::size_t filled = 0;
  std::uint8_t code = levels[0];
  map->level[0] = map->reached[0] = code;
  for (std::size_t s = 1; s < count; ++s) {
    const std::uint8_t next = levels[s];
    if (next > code) {
      // The upper one of two that are equally near.
      const std::size_t first = (std::size_t{code} + next + 1) / 2;
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
