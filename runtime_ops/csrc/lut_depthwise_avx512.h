// Depthwise convolution with 512-bit VNNI: 16 neighbouring outputs of one channel at a time. A shuffle brings the four
// activations that one output needs of a row of taps next to each other; one dot product adds them up.
#ifndef POSTQUANT_CSRC_LUT_DEPTHWISE_AVX512_H_
#define POSTQUANT_CSRC_LUT_DEPTHWISE_AVX512_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lut_depthwise.h"
#include "lut_table.h"

namespace postquant::lut {
namespace {

// Element stride * q + dilation * t of a row goes to byte 4 * q + t.
struct Neighbours {
#if defined(POSTQUANT_LUT_VBMI)
  __m512i index;

  static bool Possible(std::int64_t stride, std::int64_t dilation) { return 15 * stride + 3 * dilation < 64; }

  Neighbours(std::int64_t stride, std::int64_t dilation) {
    std::uint8_t bytes[64];
    for (std::int64_t i = 0; i < 64; ++i) {
      bytes[i] = static_cast<std::uint8_t>(stride * (i / 4) + dilation * (i % 4));
    }
    index = _mm512_loadu_si512(bytes);
  }

  __m512i operator()(const std::uint8_t* p) const { return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(p)); }
#else
  __m512i words;
  __m512i bytes;

  static bool Possible(std::int64_t stride, std::int64_t dilation) { return stride <= 4 && stride + dilation <= 5; }

  Neighbours(std::int64_t stride, std::int64_t dilation) {
    // Four outputs, a quarter of the register, begin at a whole word and reach over 16 bytes at most.
    std::int32_t word[16];
    std::uint8_t byte[64];
    for (std::int64_t i = 0; i < 16; ++i) {
      word[i] = static_cast<std::int32_t>(stride * (i / 4) + i % 4);
    }
    for (std::int64_t i = 0; i < 64; ++i) {
      byte[i] = static_cast<std::uint8_t>(stride * (i % 16 / 4) + dilation * (i % 4));
    }
    words = _mm512_loadu_si512(word);
    bytes = _mm512_loadu_si512(byte);
  }

  __m512i operator()(const std::uint8_t* p) const {
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, _mm512_loadu_si512(p)), bytes);
  }
#endif
};

// Everything that is the same for all outputs of a channel.
struct Channel {
  __m512i start;
  __m512 factor;
  __m512 low;
  __m512 high;
  __m512i zero;

  explicit Channel(const DepthwiseCall& call)
      : start(_mm512_set1_epi32(call.start)),
        factor(_mm512_set1_ps(call.factor)),
        low(_mm512_set1_ps(static_cast<float>(call.numbers.low - call.numbers.zero_point))),
        high(_mm512_set1_ps(static_cast<float>(call.numbers.high - call.numbers.zero_point))),
        zero(_mm512_set1_epi32(call.numbers.zero_point)) {}

  void Store(__m512i sums, __mmask16 mask, std::uint8_t* y) const {
    const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), factor);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(product, high), low));
    _mm_mask_storeu_epi8(y, mask, _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, zero)));
  }
};

inline __m512i Taps(const std::int8_t* taps) {
  std::int32_t levels;
  std::memcpy(&levels, taps, sizeof levels);
  return _mm512_set1_epi32(levels);
}

inline __mmask16 Columns(std::int64_t rest) {
  return rest >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1U << rest) - 1U);
}

// Any kernel.
inline void DepthwiseAny(const DepthwiseCall& call, const Neighbours& neighbours) {
  const Channel channel(call);
  const std::int64_t quads = (call.kernel[1] + 3) / 4;
  for (std::int64_t y = 0; y < call.out_size[0]; ++y) {
    for (std::int64_t x = 0; x < call.out_size[1]; x += 16) {
      const std::uint8_t* const from = call.plane + y * call.stride[0] * call.plane_width + x * call.stride[1];
      __m512i sums = channel.start;
      for (std::int64_t ky = 0; ky < call.kernel[0]; ++ky) {
        for (std::int64_t quad = 0; quad < quads; ++quad) {
          const __m512i activations =
              neighbours(from + ky * call.dilation[0] * call.plane_width + 4 * quad * call.dilation[1]);
          sums = _mm512_dpbusd_epi32(sums, activations, Taps(call.taps + 4 * (ky * quads + quad)));
        }
      }
      channel.Store(sums, Columns(call.out_size[1] - x), call.y + y * call.out_size[1] + x);
    }
  }
}

// A kernel of Rows x at most 4 * Quads taps without vertical dilation. Goes down 16 columns; with stride 1 the rows
// that two outputs share are loaded once.
template <int Rows, int Quads>
void DepthwiseFixed(const DepthwiseCall& call, const Neighbours& neighbours) {
  const Channel channel(call);
  __m512i taps[Rows][Quads];
  for (int ky = 0; ky < Rows; ++ky) {
    for (int quad = 0; quad < Quads; ++quad) {
      taps[ky][quad] = Taps(call.taps + 4 * (ky * Quads + quad));
    }
  }
  const bool shared = call.stride[0] == 1;
  for (std::int64_t x = 0; x < call.out_size[1]; x += 16) {
    const std::uint8_t* from = call.plane + x * call.stride[1];
    std::uint8_t* to = call.y + x;
    const __mmask16 columns = Columns(call.out_size[1] - x);
    __m512i rows[Rows][Quads];
    for (std::int64_t y = 0; y < call.out_size[0]; ++y) {
      for (int ky = 0; ky < Rows; ++ky) {
        for (int quad = 0; quad < Quads; ++quad) {
          if (shared && y > 0 && ky + 1 < Rows) {
            rows[ky][quad] = rows[ky + 1 < Rows ? ky + 1 : ky][quad];
          } else {
            rows[ky][quad] = neighbours(from + ky * call.plane_width + 4 * quad * call.dilation[1]);
          }
        }
      }
      __m512i sums = channel.start;
      for (int ky = 0; ky < Rows; ++ky) {
        for (int quad = 0; quad < Quads; ++quad) {
          sums = _mm512_dpbusd_epi32(sums, rows[ky][quad], taps[ky][quad]);
        }
      }
      channel.Store(sums, columns, to);
      from += call.stride[0] * call.plane_width;
      to += call.out_size[1];
    }
  }
}

inline void DepthwiseVnni(const DepthwiseCall& call) {
  if (!Neighbours::Possible(call.stride[1], call.dilation[1])) {
    Depthwise<std::uint8_t>(call);
    return;
  }
  const Neighbours neighbours(call.stride[1], call.dilation[1]);
  const std::int64_t quads = (call.kernel[1] + 3) / 4;
  if (call.dilation[0] == 1 && call.kernel[0] == 3 && quads == 1) {
    DepthwiseFixed<3, 1>(call, neighbours);
  } else if (call.dilation[0] == 1 && call.kernel[0] == 5 && quads == 2) {
    DepthwiseFixed<5, 2>(call, neighbours);
  } else {
    DepthwiseAny(call, neighbours);
  }
}

}  // namespace
}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_DEPTHWISE_AVX512_H_
