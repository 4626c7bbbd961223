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
  tile.runs = 0;
  while (begin < end) {
    const std::size_t count = std::min(end - begin, inner - begin % inner);
    tile.run[tile.runs++] = {begin / inner * channels * inner + begin % inner, count};
    begin += count;
  }
  return tile;
}

}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_FEEDBACK_TILE_H_
