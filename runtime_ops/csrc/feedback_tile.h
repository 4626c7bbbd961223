// Tiles of positions whose channels are rounded together.
#ifndef POSTQUANT_CSRC_FEEDBACK_TILE_H_
#define POSTQUANT_CSRC_FEEDBACK_TILE_H_

#include <algorithm>
#include <cstddef>

#include "quantize_kernels.h"

namespace postquant::quantize {

// Positions `begin` to `end` of [outer][channels][inner].
inline FeedbackTile TileOf(std::size_t begin, std::size_t end, std::size_t channels, std::size_t inner) {
  FeedbackTile tile;
  tile.channel_step = inner;
  tile.row_step = 0;
  tile.whole_cells = true;
  tile.runs = 0;
  while (begin < end) {
    const std::size_t count = std::min(end - begin, inner - begin % inner);
    tile.run[tile.runs++] = {begin / inner * channels * inner + begin % inner, count, 1, 1};
    begin += count;
  }
  return tile;
}

// Planes [outer][channels][height][width] in squares of side `cell`, which begin at the corner of every plane.
struct CellPlanes {
  std::size_t cell;
  std::size_t channels;
  std::size_t height;
  std::size_t width;

  std::size_t Rows() const { return (height + cell - 1) / cell; }
  std::size_t Columns() const { return (width + cell - 1) / cell; }
};

// Cells `begin` to `end` of [outer][Rows()][Columns()]; planes are not empty.
inline FeedbackTile TileOf(std::size_t begin, std::size_t end, const CellPlanes& planes) {
  const std::size_t cell = planes.cell;
  const std::size_t columns = planes.Columns();
  const std::size_t plane = planes.height * planes.width;
  FeedbackTile tile;
  tile.channel_step = plane;
  tile.row_step = planes.width;
  tile.whole_cells = true;
  tile.runs = 0;
  while (begin < end) {
    const std::size_t outer = begin / columns / planes.Rows();
    const std::size_t row = begin / columns % planes.Rows() * cell;
    const std::size_t column = begin % columns;
    const std::size_t count = std::min(end - begin, columns - column);
    FeedbackRun& run = tile.run[tile.runs++];
    run.first = outer * planes.channels * plane + row * planes.width + column * cell;
    run.count = count;
    run.rows = std::min(cell, planes.height - row);
    run.columns = std::min(cell, planes.width - (column + count - 1) * cell);
    tile.whole_cells = tile.whole_cells && run.rows == cell && run.columns == cell;
    begin += count;
  }
  return tile;
}

}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_FEEDBACK_TILE_H_
