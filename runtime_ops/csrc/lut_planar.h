// Convolutions without strides whose pixels, not outputs, go across a register: what a planar kernel is given.
//
// Four channel planes of an image are interleaved (one word per pixel), so that 16 neighbouring words are what one dot
// product takes for 16 neighbouring outputs of one channel. Sums then leave as they are stored, channel by channel, and
// nothing has to be transposed. There is a copy of a plane for each kernel column, shifted by it and as wide as the
// output, so that outputs that follow one another always read words that do. Layouts:
//
//   planes    activations of one image: [channels / 4][kernel columns][plane_bytes], a plane being [padded height]
//             [output width] words; channels beyond the last meet levels of 0
//   tile      levels of kPlanarRows outputs: [kernel rows][kernel columns][channels / 4][kPlanarRows] words
#ifndef POSTQUANT_CSRC_LUT_PLANAR_H_
#define POSTQUANT_CSRC_LUT_PLANAR_H_

#include <cstdint>

#include "lut_table.h"

namespace postquant::lut {

constexpr int kPlanarRows = 6;      // outputs of a tile
constexpr int kPlanarChannels = 4;  // channels of a plane
constexpr int kPlanarPixels = 16;   // pixels of a register
constexpr std::int64_t kMostPlanarCopies = 8;  // kernel columns

// y[m][p] = requantize(start[m] + sum of words) for the outputs m < `outputs` and `pixels` pixels.
struct PlanarCall {
  const std::uint8_t* planes;  // of the first pixel
  std::int64_t group_count;    // of four channels
  std::int64_t kernel[2];
  std::int64_t tap_step[2];    // bytes from a kernel row or column to the next
  std::int64_t group_step;     // bytes from four channels to the next
  std::int64_t pixels;
  const std::uint8_t* tiles;
  std::int64_t tile_bytes;
  const std::int32_t* start;  // [outputs]
  const float* factor;        // [outputs]
  OutputNumbers numbers;
  std::int64_t outputs;
  std::uint8_t* y;
  std::int64_t y_stride;  // pixels of a channel
};

// The planes of `channels` <= 4 channels. What is outside the image is the zero point.
struct InterleaveCall {
  const std::uint8_t* x;
  int channels;
  std::int64_t channel_stride;
  std::int64_t size[2];
  std::int64_t pad_begin[2];
  std::int64_t plane_size[2];
  std::int64_t copies;    // kernel columns
  std::int64_t dilation;  // between them
  std::int64_t plane_bytes;
  std::uint8_t zero_point;
  std::uint8_t flip;  // 0x80 where codes are shifted by 128, or 0
  std::uint8_t* out;
};

}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_PLANAR_H_
