// The kernels of lut_planar.h with 512-bit VNNI.
#ifndef POSTQUANT_CSRC_LUT_PLANAR_AVX512_H_
#define POSTQUANT_CSRC_LUT_PLANAR_AVX512_H_

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lut_planar.h"
#include "lut_simd_avx512.h"

namespace postquant::lut {
namespace {

constexpr std::int64_t kRegisterBytes = 64;

// Stores output R of a tile and those after it. A recursion, because a loop would keep the sums in memory.
template <int R, int Rows, int V>
inline void StoreOutputs(const Simd::Sums (&sums)[Rows][V], const PlanarCall& call, const float* factor, int pixels,
                         std::uint8_t* y) {
  if constexpr (R < Rows) {
    const __m512 all = _mm512_set1_ps(factor[R]);
    const __m512 factors[Simd::kVectors] = {all, all, all, all};
    const Simd::Sums row[Simd::kVectors] = {sums[R][0], sums[R][1 < V ? 1 : 0], sums[R][2 < V ? 2 : 0],
                                            sums[R][3 < V ? 3 : 0]};
    Simd::StoreBytes(Simd::Requantize(row, factors, call.numbers), pixels, y);
    StoreOutputs<R + 1>(sums, call, factor, pixels, y + call.y_stride);
  }
}

// R outputs of V registers of pixels.
template <int R, int V>
void PlanarTile(const PlanarCall& call, std::int64_t output, std::int64_t pixel) {
  Simd::Sums sums[R][V];
  for (int r = 0; r < R; ++r) {
    const Simd::Sums start = _mm512_set1_epi32(call.start[output + r]);
    for (int v = 0; v < V; ++v) {
      sums[r][v] = start;
    }
  }
  const std::uint8_t* tile = call.tiles + output / kPlanarRows * call.tile_bytes;
  const std::uint8_t* const planes = call.planes + pixel * static_cast<std::int64_t>(kWord);
  for (std::int64_t i = 0; i < call.kernel[0]; ++i) {
    for (std::int64_t j = 0; j < call.kernel[1]; ++j) {
      const std::uint8_t* from = planes + i * call.tap_step[0] + j * call.tap_step[1];
      for (std::int64_t group = 0; group < call.group_count; ++group) {
        Simd::Words x[V];
        for (int v = 0; v < V; ++v) {
          x[v] = Simd::LoadWords(from + v * kRegisterBytes);
        }
        for (int r = 0; r < R; ++r) {
          const Simd::Words weights = Simd::Spread(tile + static_cast<std::int64_t>(kWord) * r);
          for (int v = 0; v < V; ++v) {
            sums[r][v] = Simd::Dot(sums[r][v], x[v], weights);
          }
        }
        from += call.group_step;
        tile += static_cast<std::int64_t>(kWord) * kPlanarRows;
      }
    }
  }
  const auto pixels = static_cast<int>(std::min<std::int64_t>(call.pixels - pixel, V * kPlanarPixels));
  StoreOutputs<0>(sums, call, call.factor + output, pixels, call.y + output * call.y_stride + pixel);
}

template <int V>
void PlanarRows(const PlanarCall& call, std::int64_t output, std::int64_t pixel) {
  switch (call.outputs - output) {
    case 1:
      return PlanarTile<1, V>(call, output, pixel);
    case 2:
      return PlanarTile<2, V>(call, output, pixel);
    case 3:
      return PlanarTile<3, V>(call, output, pixel);
    case 4:
      return PlanarTile<4, V>(call, output, pixel);
    case 5:
      return PlanarTile<5, V>(call, output, pixel);
    default:
      return PlanarTile<kPlanarRows, V>(call, output, pixel);
  }
}

inline void Planar(const PlanarCall& call) {
  // Register tiles of about the same number of registers: one alone could not hide the latency of the dot product.
  const std::int64_t registers = (call.pixels + kPlanarPixels - 1) / kPlanarPixels;
  const std::int64_t tiles = (registers + Simd::kVectors - 1) / Simd::kVectors;
  for (std::int64_t output = 0; output < call.outputs; output += kPlanarRows) {
    for (std::int64_t t = 0; t < tiles; ++t) {
      const std::int64_t begin = registers * t / tiles;
      const std::int64_t pixel = begin * kPlanarPixels;
      switch (registers * (t + 1) / tiles - begin) {
        case 1:
          PlanarRows<1>(call, output, pixel);
          break;
        case 2:
          PlanarRows<2>(call, output, pixel);
          break;
        case 3:
          PlanarRows<3>(call, output, pixel);
          break;
        default:
          PlanarRows<4>(call, output, pixel);
      }
    }
  }
}

inline __mmask16 FirstPixels(std::int64_t count) {
  return count >= kPlanarPixels ? __mmask16{0xffff} : static_cast<__mmask16>((1U << count) - 1U);
}

// 16 words of four channels, in quarters; those beyond `mask` are of no use.
struct PixelWords {
  __m128i quarters[4];

  PixelWords(const InterleaveCall& call, const std::uint8_t* from, __mmask16 mask) {
    const __m128i flip = _mm_set1_epi8(static_cast<char>(call.flip));
    __m128i channels[kPlanarChannels];
    for (int c = 0; c < kPlanarChannels; ++c) {
      const int channel = c < call.channels ? c : 0;
      channels[c] = _mm_xor_si128(_mm_maskz_loadu_epi8(mask, from + channel * call.channel_stride), flip);
    }
    const __m128i low01 = _mm_unpacklo_epi8(channels[0], channels[1]);
    const __m128i high01 = _mm_unpackhi_epi8(channels[0], channels[1]);
    const __m128i low23 = _mm_unpacklo_epi8(channels[2], channels[3]);
    const __m128i high23 = _mm_unpackhi_epi8(channels[2], channels[3]);
    quarters[0] = _mm_unpacklo_epi16(low01, low23);
    quarters[1] = _mm_unpackhi_epi16(low01, low23);
    quarters[2] = _mm_unpacklo_epi16(high01, high23);
    quarters[3] = _mm_unpackhi_epi16(high01, high23);
  }

  __m512i All() const {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quarters[0]), quarters[1], 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quarters[2]), quarters[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }

  void Store(std::uint8_t* to) const {
    for (int i = 0; i < 4; ++i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * i), quarters[i]);
    }
  }
};

inline void Interleave(const InterleaveCall& call) {
  constexpr auto kWordBytes = static_cast<std::int64_t>(kWord);
  const std::int64_t width = call.plane_size[1];
  const bool whole = call.copies == 1 && width == call.size[1] && call.plane_size[0] == call.size[0];
  if (!whole) {
    std::memset(call.out, call.zero_point, static_cast<std::size_t>(call.copies * call.plane_bytes));
  }
  for (std::int64_t w = 0; w < call.size[1]; w += kPlanarPixels) {
    const __mmask16 mask = FirstPixels(call.size[1] - w);
    // Where these words go in each copy: some may lie before or behind the row.
    std::int64_t offsets[kMostPlanarCopies];
    __mmask16 inside[kMostPlanarCopies];
    for (std::int64_t copy = 0; copy < call.copies; ++copy) {
      const std::int64_t at = w + call.pad_begin[1] - copy * call.dilation;
      const bool some = at > -kPlanarPixels && at < width;
      const __mmask16 before = some && at < 0 ? FirstPixels(-at) : __mmask16{0};
      offsets[copy] = some ? copy * call.plane_bytes + at * kWordBytes : 0;
      inside[copy] = some ? static_cast<__mmask16>(mask & FirstPixels(width - at) & ~before) : __mmask16{0};
    }
    const std::uint8_t* from = call.x + w;
    std::uint8_t* to = call.out + call.pad_begin[0] * width * kWordBytes;
    for (std::int64_t y = 0; y < call.size[0]; ++y) {
      const PixelWords words(call, from, mask);
      if (whole && mask == 0xffff) {
        words.Store(to + w * kWordBytes);
      } else {
        const __m512i all = words.All();
        for (std::int64_t copy = 0; copy < call.copies; ++copy) {
          _mm512_mask_storeu_epi32(to + offsets[copy], inside[copy], all);
        }
      }
      from += call.size[1];
      to += width * kWordBytes;
    }
  }
}

}  // namespace
}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_PLANAR_AVX512_H_
