// Depthwise convolution in plain C++, for any kernel, stride and dilation.
#ifndef POSTQUANT_CSRC_LUT_DEPTHWISE_H_
#define POSTQUANT_CSRC_LUT_DEPTHWISE_H_

#include <cstdint>

#include "lut_body.h"
#include "lut_table.h"

namespace postquant::lut {
namespace {

// A product of a centered activation (9 bits) and a level (8 bits) fits in 16 bits; one of a byte needs no less.
inline std::int32_t TapProduct(std::int16_t x, std::int16_t level) {
  return static_cast<std::int16_t>(x * level);
}
inline std::int32_t TapProduct(std::uint8_t x, std::int16_t level) {
  return static_cast<std::int16_t>(static_cast<std::int16_t>(x) * level);
}
inline std::int32_t TapProduct(std::int8_t x, std::int16_t level) {
  return static_cast<std::int16_t>(static_cast<std::int16_t>(x) * level);
}

template <typename Element>
void Depthwise(const DepthwiseCall& call) {
  constexpr std::int64_t kStrip = 256;
  const std::int64_t taps_width = (call.kernel[1] + 3) / 4 * 4;
  const Element* const plane = reinterpret_cast<const Element*>(call.plane);
  for (std::int64_t y = 0; y < call.out_size[0]; ++y) {
    for (std::int64_t x = 0; x < call.out_size[1]; x += kStrip) {
      const int count = static_cast<int>(call.out_size[1] - x < kStrip ? call.out_size[1] - x : kStrip);
      std::int32_t sums[kStrip];
      for (int i = 0; i < count; ++i) {
        sums[i] = call.start;
      }
      for (std::int64_t ky = 0; ky < call.kernel[0]; ++ky) {
        const Element* const row =
            plane + (y * call.stride[0] + ky * call.dilation[0]) * call.plane_width + x * call.stride[1];
        for (std::int64_t kx = 0; kx < call.kernel[1]; ++kx) {
          const Element* const from = row + kx * call.dilation[1];
          const std::int16_t level = call.taps[ky * taps_width + kx];
          if (call.stride[1] == 1) {
            for (int i = 0; i < count; ++i) {
              sums[i] += TapProduct(from[i], level);
            }
          } else if (call.stride[1] == 2) {
            for (int i = 0; i < count; ++i) {
              sums[i] += TapProduct(from[2 * i], level);
            }
          } else {
            for (int i = 0; i < count; ++i) {
              sums[i] += TapProduct(from[i * call.stride[1]], level);
            }
          }
        }
      }
      RequantizeChannel(sums, call.factor, count, call.numbers, call.y + y * call.out_size[1] + x);
    }
  }
}

}  // namespace
}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_DEPTHWISE_H_
