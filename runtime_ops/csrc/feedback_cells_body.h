// Rows of the channels of cells, which are squares of places: one text, compiled once per instruction set.
#ifndef POSTQUANT_CSRC_FEEDBACK_CELLS_BODY_H_
#define POSTQUANT_CSRC_FEEDBACK_CELLS_BODY_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "quantize_kernels.h"

namespace postquant::quantize {
namespace {

// A line is what one row of places has at the positions of a tile: kTilePositions times `cell` neighbours. Its `cell`
// rows are `step` apart. The side is a constant where that makes loops of whole registers.
template <std::size_t kCell>
inline void SplitLine(const std::uint8_t* __restrict line, std::size_t cell, std::uint8_t* __restrict rows,
                      std::size_t step) {
  const std::size_t side = kCell == 0 ? cell : kCell;
  for (std::size_t j = 0; j < side; ++j) {
    std::uint8_t* __restrict const row = rows + j * step;
    for (std::size_t p = 0; p < kTilePositions; ++p) {
      row[p] = line[p * side + j];
    }
  }
}

template <std::size_t kCell>
inline void JoinLine(const std::uint8_t* __restrict rows, std::size_t step, std::size_t cell,
                     std::uint8_t* __restrict line) {
  const std::size_t side = kCell == 0 ? cell : kCell;
  for (std::size_t p = 0; p < kTilePositions; ++p) {
    for (std::size_t j = 0; j < side; ++j) {
      line[p * side + j] = rows[j * step + p];
    }
  }
}

// take(row of places, first of its rows, memory of its line, elements of channel 0 before that row)
// for every row of places of every channel of x.
template <typename Take>
inline void OverLines(const FeedbackPlan& plan, const FeedbackTile& tile, const Take& take) {
  const std::size_t channels = plan.channels / (plan.cell * plan.cell);
  for (std::size_t i = 0; i < plan.cell; ++i) {
    for (std::size_t c = 0; c < channels; ++c) {
      take(i, (i * plan.cell * channels + c) * kTilePositions, c * tile.channel_step + i * tile.row_step);
    }
  }
}

// Elements of a run in one row of places.
inline std::size_t Elements(const FeedbackRun& run, std::size_t cell) { return (run.count - 1) * cell + run.columns; }

// Rows [channels][kTilePositions] of x; where there is no place they hold anything.
template <std::size_t kCell>
void GatherSquares(const FeedbackPlan& plan, const FeedbackTile& tile, const std::uint8_t* x, std::uint8_t* rows) {
  std::uint8_t line[kTilePositions * kLargestCell] = {};
  const std::size_t step = plan.channels / (plan.cell * plan.cell) * kTilePositions;
  OverLines(plan, tile, [&](std::size_t i, std::size_t row, std::size_t before) {
    std::uint8_t* to = line;
    for (std::size_t k = 0; k < tile.runs; to += tile.run[k].count * plan.cell, ++k) {
      if (i < tile.run[k].rows) {
        std::memcpy(to, x + before + tile.run[k].first, Elements(tile.run[k], plan.cell));
      }
    }
    SplitLine<kCell>(line, plan.cell, rows + row, step);
  });
}

template <std::size_t kCell>
void ScatterSquares(const FeedbackPlan& plan, const FeedbackTile& tile, const std::uint8_t* rows, std::uint8_t* y) {
  std::uint8_t line[kTilePositions * kLargestCell];
  const std::size_t step = plan.channels / (plan.cell * plan.cell) * kTilePositions;
  OverLines(plan, tile, [&](std::size_t i, std::size_t row, std::size_t before) {
    JoinLine<kCell>(rows + row, step, plan.cell, line);
    const std::uint8_t* from = line;
    for (std::size_t k = 0; k < tile.runs; from += tile.run[k].count * plan.cell, ++k) {
      if (i < tile.run[k].rows) {
        std::memcpy(y + before + tile.run[k].first, from, Elements(tile.run[k], plan.cell));
      }
    }
  });
}

// run(side), a constant where that pays, else 0.
template <typename Run>
inline void WithSide(std::size_t cell, const Run& run) {
  switch (cell) {
    case 2:
      return run(std::integral_constant<std::size_t, 2>{});
    case 3:
      return run(std::integral_constant<std::size_t, 3>{});
    case 4:
      return run(std::integral_constant<std::size_t, 4>{});
    default:
      return run(std::integral_constant<std::size_t, 0>{});
  }
}

inline void GatherCells(const FeedbackPlan& plan, const FeedbackTile& tile, const std::uint8_t* x,
                        std::uint8_t* rows) {
  WithSide(plan.cell, [&](auto side) { GatherSquares<decltype(side)::value>(plan, tile, x, rows); });
}

inline void ScatterCells(const FeedbackPlan& plan, const FeedbackTile& tile, const std::uint8_t* rows,
                         std::uint8_t* y) {
  WithSide(plan.cell, [&](auto side) { ScatterSquares<decltype(side)::value>(plan, tile, rows, y); });
}

// There is no error at row i and column j of cells that have no such place.
inline void ClearBeyond(const FeedbackTile& tile, std::size_t i, std::size_t j, std::int16_t* errors) {
  for (std::size_t k = 0; k < tile.runs; errors += tile.run[k].count, ++k) {
    const FeedbackRun& run = tile.run[k];
    if (i >= run.rows) {
      std::memset(errors, 0, run.count * sizeof *errors);
    } else if (j >= run.columns) {
      errors[run.count - 1] = 0;
    }
  }
}

}  // namespace
}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_FEEDBACK_CELLS_BODY_H_
