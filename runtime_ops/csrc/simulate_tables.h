// What the cells of a channel's grid mean, from its levels: the laws of calib/learn/levels.py, in float32.
#ifndef POSTQUANT_CSRC_SIMULATE_TABLES_H_
#define POSTQUANT_CSRC_SIMULATE_TABLES_H_

#include <cstddef>
#include <cstdint>

#include "quantize_kernels.h"

namespace postquant::quantize {

constexpr std::size_t kMostCells = 32000;  // places are int16

// The grid of one channel: cell k, from 0 to `cells`, stands for k / cells * (high - low) + low.
class LevelGrid {
 public:
  // levels: [count], sorted; 2 <= count <= kSimulatedLevels. position: [cells + 1], k / cells.
  LevelGrid(const float* levels, std::size_t count, std::size_t cells, const float* position);

  float low() const { return levels_[0]; }
  float per_unit() const { return per_unit_; }
  // The cells that lie between levels s and s + 1 are those from first(s) on and before first(s + 1).
  std::size_t first(std::size_t s) const { return s + 1 < count_ ? first_[s] : cells_ + 1; }
  // Where a cell lies between levels s and s + 1, from 0 to 1.
  float Share(std::size_t cell, std::size_t s) const;
  // The first cell, from 0 on, that gets level s + 1 or a higher one; cells + 1 where none does.
  std::size_t FirstAbove(std::size_t s) const;
  // The same numbers for Kernels::cell_tables.
  CellGrid Cells() const;

 private:
  const float* levels_;
  std::size_t count_;
  std::size_t cells_;
  const float* position_;
  float span_;
  float per_unit_;
  std::size_t first_[kSimulatedLevels];
};

// Memory for SimulatedLevels of some channels, whose numbers follow each other channel by channel, or level by level
// where elements of all channels do.
struct LevelRoom {
  float* position;  // [cells + 1], set by MakePositions
  float* low;
  float* per_unit;
  float* first;
  float* level;
};
void MakePositions(std::size_t cells, float* position);
SimulatedLevels MakeLevels(const float* levels, std::size_t channels, std::size_t count, std::size_t cells,
                           bool across, const LevelRoom& room);

// The grid of codes of 8 bits that the levels of all channels are among.
struct CodeGrid {
  CodeGrid(const float* levels, std::size_t count);
  float step;
  float zero;
};

// The nearest of sorted codes of levels to every code; of map->level the first element alone unless `all`.
void MapLevels(const std::uint8_t* levels, std::size_t count, bool all, LevelMap* map);

}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_SIMULATE_TABLES_H_
