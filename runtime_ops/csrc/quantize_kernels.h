// What AdaptiveQuantize, AdaptiveRequantize, BorderQuantize, LutRequantize and FeedbackRequantize do with elements,
// compiled per instruction set.
//
// Nothing here throws, allocates, makes threads or knows onnxruntime. Every set gives the same bits, except the order
// in which `pool_float` adds up float64 numbers.
#ifndef POSTQUANT_CSRC_QUANTIZE_KERNELS_H_
#define POSTQUANT_CSRC_QUANTIZE_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "simulate_kernels.h"

namespace postquant::quantize {

// Statistics of some elements.
struct Moments {
  double sum;
  double squares;
  double largest;  // magnitude
};

// y = clip(round_half_even(x / step) + zero_point, low, high); 0 <= low <= high <= 255.
struct CodeRange {
  std::int32_t zero_point;
  std::int32_t low;
  std::int32_t high;
};

// The border of one channel. `levels` of 1: the same for all integer parts.
struct ChannelBorder {
  const float* table;  // [levels]
  std::int32_t levels;
  float window_scale;
  float across_scale;
};

// Sums of residuals around one row of outputs; null where there are none, which is one of them at most.
struct Neighbours {
  const std::int16_t* window;
  const float* across;
};

// `window`, `mix`, `combine` and those that move rows work on whole groups of this many points: what they read and
// write may reach less than a group beyond the last point. `spread_rows` writes nothing beyond its last row.
constexpr std::size_t kPadding = 32;

// Rows of weights across channels are filled up with zeros to this length.
constexpr std::size_t Even(std::size_t count) { return (count + 1) / 2 * 2; }

// Levels of one channel of LutRequantize: level[code], which never falls, and the same as steps up from level[0].
constexpr std::size_t kMostSteps = 15;
struct LevelMap {
  std::uint8_t level[256];
  std::uint8_t steps;
  std::int8_t below[kMostSteps + 1];     // the last code before each step, minus 128; 127 behind the last step
  std::uint8_t reached[kMostSteps + 1];  // the level after so many steps
};

// The steps of all channels, for elements of which each is another channel's: rows of `channels` numbers.
struct LevelRows {
  std::size_t channels;
  std::size_t steps;           // the most of a channel
  const std::uint8_t* lowest;  // [channels]
  const std::int8_t* below;    // [kMostSteps][channels]
  const std::uint8_t* above;   // [kMostSteps][channels]
};

// FeedbackRequantize: all numbers, with channels in the order of their groups.
constexpr std::size_t kFeedbackGroups = 8;
constexpr std::size_t kLargestCell = 8;
struct FeedbackPlan {
  std::size_t channels;               // at a position
  std::size_t cell;                   // a position is a square of this side; all channels of its first place, then ...
  std::size_t rank;
  std::size_t groups;                 // those with channels
  std::size_t ends[kFeedbackGroups];  // where they end in the order
  const std::size_t* order;           // [channels]: their numbers
  const LevelMap* maps;               // [channels of a place, by number], or one; of codes on the levels' grid
  std::size_t map_step;               // 0 for one
  const std::int16_t* left;           // for one group after the other: [rank][Even(size)]
  const float* left_scale;            // [rank]
  const std::int16_t* right;          // [channels, in order][Even(rank)]
  const float* right_scale;           // [channels, in order]
  // The code on the levels' grid of a code of x: the same; or clip(round((code - x_zero_point) * x_scale * reciprocal)
  // + zero_point), unless the reciprocal is 0; or what the table says.
  bool same_codes;
  float x_scale;
  std::int32_t x_zero_point;
  float reciprocal;
  CodeRange range;
  const std::uint8_t* codes;          // [256]
};

// Positions that are computed together: all channels of `count` of them, which follow each other `count` at a time.
constexpr std::size_t kTilePositions = 64;
struct FeedbackRun {
  std::size_t first;  // element of channel 0
  std::size_t count;
  // Cells beyond the plane: rows of places that there are in all of them, and columns in the last one.
  std::size_t rows;
  std::size_t columns;
};
struct FeedbackTile {
  std::size_t channel_step;  // elements from one channel to the next
  std::size_t row_step;      // from one row of places to the next, where there are cells
  bool whole_cells;          // no cell is beyond its plane
  std::size_t runs;
  FeedbackRun run[kTilePositions];
};

// Memory of a tile.
struct FeedbackScratch {
  std::int32_t* sums;    // [rank][kTilePositions]
  std::int16_t* inner;   // [Even(rank)][kTilePositions]
  std::int16_t* errors;  // [channels of the largest group][kTilePositions]
  std::uint8_t* rows;    // [channels][kTilePositions] if channel_step is 1, or cells are larger than 1
};

// For fewer elements of a channel, or channels of a row, than this a call is not worth it: look up each element.
constexpr std::size_t kFewestPoints = 16;

struct Kernels {
  // Adaptive*. `squares` and `largest` are computed if asked for.
  void (*pool_float)(const float* x, std::size_t count, bool squares, bool largest, Moments* out);
  // Exact: integers, of codes minus `zero_point`.
  void (*pool_codes)(const std::uint8_t* x, std::size_t count, std::int32_t zero_point, Moments* out);
  void (*quantize)(const float* x, std::size_t count, float step, const CodeRange& range, std::uint8_t* y);
  // The same for x = (code - x_zero_point) * x_scale.
  void (*requantize)(const std::uint8_t* x, std::size_t count, float x_scale, std::int32_t x_zero_point, float step,
                     const CodeRange& range, std::uint8_t* y);

  // BorderQuantize. `range` limits the codes; ratio = clip(x / scale, low - zero_point, high - zero_point).
  void (*border)(const float* x, std::size_t count, float scale, const CodeRange& range, const ChannelBorder& border,
                 std::uint8_t* y);
  // ratio, and its residual in units of 1 / 128.
  void (*residual)(const float* x, std::size_t count, float scale, const CodeRange& range, float* ratio,
                   std::int16_t* residual);
  // Rows of `width` elements, one after the other, moved `stride` >= width apart with zeros between them; and back.
  void (*spread_rows)(const std::int16_t* from, std::size_t width, std::size_t rows, std::size_t stride,
                      std::int16_t* to);
  void (*gather_rows)(const std::int16_t* from, std::size_t width, std::size_t rows, std::size_t stride,
                      std::int16_t* to);
  // sums[p] = sum over i < rows, j < columns of weights[i * columns + j] * residual[p + i * stride + j], p < count.
  void (*window)(const std::int16_t* residual, std::size_t stride, const std::int8_t* weights, std::size_t rows,
                 std::size_t columns, std::size_t count, std::int16_t* sums);
  // t[r][p] = clip(round_half_even(scale[r] * sum over c < channels of weights[r][c] * residual[c * step + p]), -127, 127)
  // for r < rank, in pairs: inner[r / 2 * inner_step + 2 * p + r % 2]. The last one of an odd rank has zeros beside it.
  void (*mix)(const std::int16_t* residual, std::size_t step, const std::int16_t* weights, std::size_t channels,
              const float* scale, std::size_t rank, std::size_t count, std::int16_t* inner, std::size_t inner_step);
  // sums[p] = sum over r < rank of weights[r] * t[r][p]; rank > 0
  void (*combine)(const std::int16_t* inner, std::size_t inner_step, const std::int16_t* weights, std::size_t rank,
                  std::size_t count, float* sums);
  void (*decide)(const float* ratio, std::size_t count, const CodeRange& range, const ChannelBorder& border,
                 const Neighbours& neighbours, std::uint8_t* y);

  // LutRequantize: y = map.level[x]; x and y do not overlap. Unless `looks_levels_up`, whole groups of kTilePositions
  // need the first element of map.level only.
  bool looks_levels_up;
  void (*levels)(const std::uint8_t* x, std::size_t count, const LevelMap& map, std::uint8_t* y);
  // The same for `count` rows of an element of each channel; at least kFewestPoints channels.
  void (*levels_across)(const std::uint8_t* x, std::size_t count, const LevelRows& rows, std::uint8_t* y);

  // FeedbackRequantize at the positions of a tile; x and y do not overlap.
  void (*feedback)(const FeedbackPlan& plan, const FeedbackTile& tile, const FeedbackScratch& scratch,
                   const std::uint8_t* x, std::uint8_t* y);

  // Learned code books (simulate_body.h): `count` elements of one channel, or `count` rows of an element of each.
  void (*simulate_row)(const SimulatedValues& values, std::size_t count, const SimulatedLevels& levels,
                       std::size_t channel);
  void (*simulate_across)(const SimulatedValues& values, std::size_t count, const SimulatedLevels& levels);
  void (*gradients_to_x)(const float* grad, const float* mask, const std::int16_t* places, std::size_t count,
                         float* to_x);
  // weight and bin: [kCodes]
  void (*code_tables)(const ChannelCodes& codes, float* weight, std::uint8_t* bin);
  void (*grid_codes)(const float* x, std::size_t count, float step, float zero, std::uint8_t* codes);
  void (*mask_bytes)(const float* mask, std::size_t count, std::uint8_t* kept);
  void (*tile_shifts)(const FeedbackPlan& plan, const FeedbackScratch& scratch, const std::uint8_t* codes,
                      const std::uint8_t* kept, std::int16_t* shifts);
  // to[j * to_step + i] = from[i * from_step + j] for i < rows, j < columns.
  void (*turn)(const std::uint8_t* from, std::size_t from_step, std::size_t rows, std::size_t columns,
               std::uint8_t* to, std::size_t to_step);
};

const Kernels& BaselineKernels();
const Kernels& Avx2Kernels();
const Kernels& Avx512Kernels();

// Those of the instruction set in use.
const Kernels& SelectedKernels();

}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_QUANTIZE_KERNELS_H_
