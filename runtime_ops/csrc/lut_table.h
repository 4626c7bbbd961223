// What one instruction set offers to lut_kernels.h: a table of functions and the layout that they expect.
//
// Layout. Everything is in words of 4 bytes: a word of activations holds the elements that one dot product
// instruction adds up, 4 of one byte or 2 of int16; a word of weights the same number of levels, for one output.
//
//   row       activations of one output position: `runs` of contiguous words, which start at
//             row + i * run_step[0] + j * run_step[1]   (a matrix product has one run)
//   panel     decoded weights of `panel_width` outputs: [words of all runs][panel_width] words. In tight panels the
//             elements of all runs follow one another without a gap; in others every run starts a word.
//   packed    codes of `panel_width` outputs: [steps][panel_width][elements of a word] bytes. A byte holds the codes of
//             8 / bits words: part p (bits p * bits and up) is of word step * (8 / bits) + p
//
// Elements beyond the end of a run meet levels of 0 (in a panel) or activations of 0 (packed).
#ifndef POSTQUANT_CSRC_LUT_TABLE_H_
#define POSTQUANT_CSRC_LUT_TABLE_H_

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace postquant::lut {

// How activations are stored for the dot product.
enum class Activation {
  kUnsigned,  // uint8 codes; int8 codes are shifted up by 128. The zero point is taken off through code sums.
  kSigned,    // int8 codes; uint8 codes are shifted down by 128. The same.
  kCentered,  // int16, zero point subtracted
};

constexpr std::size_t kWord = 4;
constexpr int kMaxRows = 96;          // rows of one GemmCall
constexpr std::size_t kSlack = 128;   // bytes that kernels may read beyond the end of laid out activations
constexpr int kLevels = 64;           // the table of levels, repeated to fill this many entries

struct OutputNumbers {
  std::int32_t zero_point;
  std::int32_t low;   // of the type, -128 or 0
  std::int32_t high;  // 127 or 255
};

// Where the rows of a matrix product go: with sums = start[n] + sum of words, for n < outputs,
//   y[r][n] = requantize(sums)                                             bytes, where `bias` is null
//   y[r][n] = float(sums) * factor[n] + bias[n]                            floats, otherwise
struct RowOutput {
  const std::int32_t* start;  // [panel_width]
  const float* factor;        // [panel_width]
  const float* bias;          // [panel_width] or null
  OutputNumbers numbers;
  int outputs;  // in this panel
  std::uint8_t* y;
  std::int64_t y_stride;  // elements
};

struct GemmCall {
  const std::uint8_t* rows[kMaxRows];
  int row_count;
  std::int64_t runs[2];      // number of runs, over i and j
  std::int64_t run_step[2];  // bytes
  std::int64_t run_bytes;    // activations of one run
  const std::uint8_t* panel;
  RowOutput out;
};

// The same for a few rows, straight from packed codes.
struct GemvCall {
  const std::uint8_t* x;
  std::int64_t x_stride;  // bytes
  int row_count;          // <= gemv_rows
  const std::uint8_t* packed;
  std::int64_t steps;
  int bits;
  const std::int8_t* levels;  // [kLevels]
  RowOutput out;
};

// One channel of a depthwise convolution over a padded plane. Taps: [kernel[0]][kernel[1] rounded up to 4] levels.
struct DepthwiseCall {
  const std::uint8_t* plane;
  std::int64_t plane_width;  // elements
  std::int64_t out_size[2];
  std::int64_t kernel[2];
  std::int64_t stride[2];
  std::int64_t dilation[2];
  const std::int8_t* taps;
  std::int32_t start;
  float factor;
  OutputNumbers numbers;
  std::uint8_t* y;
};

// Channels of a depthwise convolution with one output each, read where they are.
struct DirectCall {
  const std::uint8_t* x;     // the tensor
  std::int64_t x_bytes;      // of all of it
  std::int64_t first;        // channel planes to do, counted through all samples
  std::int64_t count;
  std::int64_t channels;     // of a sample
  std::int64_t in_size[2];
  std::int64_t out_size[2];
  std::int64_t kernel[2];
  std::int64_t stride[2];
  std::int64_t dilation[2];
  std::int64_t pad_begin[2];
  std::uint8_t zero_point;
  std::uint8_t flip;          // as in LayoutCall
  const std::int8_t* taps;    // of channel 0, as in DepthwiseCall
  const std::int32_t* start;  // [channels]
  const float* factor;        // [channels]
  OutputNumbers numbers;
  std::uint8_t* y;
};

// Lays rows of one image out: channels x height x width (rows `width` apart, channels `channel_stride` apart) becomes
// [rows][padded_width][channels] activations, where what is outside the image is the zero point.
struct LayoutCall {
  const std::uint8_t* x;      // the image
  const std::uint8_t* x_end;  // end of the tensor: nothing is read from here on
  std::int64_t channels;
  std::int64_t channel_stride;
  std::int64_t size[2];
  std::int64_t pad_begin[2];
  std::int64_t padded_width;
  std::int64_t row_begin;  // padded rows to do
  std::int64_t row_end;
  std::int32_t zero_point;  // of the stored activations: the value of padding, or what is subtracted (kCentered)
  std::uint8_t flip;        // 0x80 where codes are shifted by 128, or 0. For kCentered: 0x80 when codes are int8
  std::uint8_t* out;        // the padded image
};

struct PlanarCall;
struct InterleaveCall;

struct KernelTable {
  Isa isa;
  Activation activation;
  int panel_width;
  int row_tile;    // rows_per_item is a multiple of it
  bool tight;      // panels without gaps between runs, their words a multiple of panel_words
  int panel_words;
  int direct_bytes;  // rows of a matrix product whose size is a multiple of this are read where they are
  int gemv_rows;     // 0: no gemv
  // `planar` is faster than `gemm` up to so many inputs of an output, or weights of a group; 0: there is no `planar`.
  std::int64_t planar_inputs;
  std::int64_t planar_weights;
  double macs_per_ns;
  void (*gemm)(const GemmCall& call);
  void (*gemv)(const GemvCall& call);
  void (*depthwise)(const DepthwiseCall& call);
  void (*planar)(const PlanarCall& call);          // see lut_planar.h
  void (*interleave)(const InterleaveCall& call);  // the same
  // The same without a laid out plane; false: not for such a convolution, nothing is done. May be null.
  bool (*direct)(const DirectCall& call);
  void (*layout)(const LayoutCall& call);
  // out[c * out_stride + r] = in[r * in_stride + c]
  void (*transpose)(const std::uint8_t* in, std::int64_t in_stride, int rows, int columns, std::uint8_t* out,
                    std::int64_t out_stride);
  // One row of a matrix product: `count` codes, then zeros up to `padded` elements.
  void (*convert)(const std::uint8_t* x, std::int64_t count, std::int64_t padded, std::int32_t zero_point,
                  std::uint8_t flip, std::uint8_t* out);
};

// The tables, each in its own translation unit.
const KernelTable& BaselineTable();
const KernelTable& NeonDotTable();
const KernelTable& Avx2Table();
const KernelTable& AvxVnniTable();
const KernelTable& Avx512VnniTable();
const KernelTable& Avx512VbmiTable();
const KernelTable& AmxTable();

// The table of a set that is available.
const KernelTable& TableOf(Isa isa);

inline std::int64_t ElementBytes(const KernelTable& table) { return table.activation == Activation::kCentered ? 2 : 1; }

}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_TABLE_H_
