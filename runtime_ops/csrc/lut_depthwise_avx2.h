// Depthwise convolution with 256-bit registers: 16 neighbouring outputs of one channel at a time. Two taps (AVX2,
// int16) or four (VNNI, bytes) of each output are brought together and multiplied and added by one instruction.
#ifndef POSTQUANT_CSRC_LUT_DEPTHWISE_AVX2_H_
#define POSTQUANT_CSRC_LUT_DEPTHWISE_AVX2_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lut_depthwise.h"
#include "lut_simd_avx2.h"
#include "lut_table.h"

namespace postquant::lut {
namespace {

constexpr std::int64_t kColumns = 16;

// Stores 16 sums, of which `count` are in the image.
inline void StoreColumns(__m256i left, __m256i right, const DepthwiseCall& call, std::int64_t count, std::uint8_t* y) {
  const __m256 factor = _mm256_set1_ps(call.factor);
  const __m128i bytes = Requantize16(left, right, factor, factor, call.numbers);
  if (count >= kColumns) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), bytes);
  } else {
    std::uint8_t all[kColumns];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(all), bytes);
    std::memcpy(y, all, static_cast<std::size_t>(count));
  }
}

#if defined(POSTQUANT_LUT_AVXVNNI)

// Neighbours are within 16 bytes for four outputs, a half of the register.
inline void DepthwiseAvx2(const DepthwiseCall& call) {
  const std::int64_t stride = call.stride[1];
  const std::int64_t dilation = call.dilation[1];
  if (stride > 4 || stride + dilation > 5) {
    Depthwise<std::uint8_t>(call);
    return;
  }
  std::uint8_t places[32];
  for (std::int64_t i = 0; i < 32; ++i) {
    places[i] = static_cast<std::uint8_t>(stride * (i % 16 / 4) + dilation * (i % 4));
  }
  const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places));
  const auto neighbours = [&](const std::uint8_t* p) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 4 * stride));
    return _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), index);
  };
  const std::int64_t quads = (call.kernel[1] + 3) / 4;
  for (std::int64_t y = 0; y < call.out_size[0]; ++y) {
    for (std::int64_t x = 0; x < call.out_size[1]; x += kColumns) {
      const std::uint8_t* const from = call.plane + y * call.stride[0] * call.plane_width + x * stride;
      __m256i left = _mm256_set1_epi32(call.start);
      __m256i right = left;
      const std::int8_t* taps = call.taps;
      for (std::int64_t ky = 0; ky < call.kernel[0]; ++ky) {
        for (std::int64_t quad = 0; quad < quads; ++quad, taps += 4) {
          const std::uint8_t* const at = from + ky * call.dilation[0] * call.plane_width + 4 * quad * dilation;
          const __m256i levels = Simd::Spread(reinterpret_cast<const std::uint8_t*>(taps));
          left = Simd::Dot(left, neighbours(at), levels);
          right = Simd::Dot(right, neighbours(at + 8 * stride), levels);
        }
      }
      StoreColumns(left, right, call, call.out_size[1] - x, call.y + y * call.out_size[1] + x);
    }
  }
}

#else

// Two taps: where they are from the first activation of an output, and their levels.
struct TapPairs {
  static constexpr int kMost = 64;
  int count = 0;
  std::int64_t first[kMost];
  std::int64_t second[kMost];
  __m256i levels[kMost];

  void Add(std::int64_t at, std::int8_t level, std::int64_t next_at, std::int8_t next_level) {
    first[count] = at;
    second[count] = next_at;
    const std::int16_t both[2] = {level, next_level};
    levels[count++] = Simd::Spread(reinterpret_cast<const std::uint8_t*>(both));
  }
};

// Stride 1: activations of any two taps are interleaved. That works within 128 bits; as all sums start equal, putting
// the results in order is enough.
inline void Columns1(const std::int16_t* from, const TapPairs& pairs, __m256i* left, __m256i* right) {
  __m256i low = *left;  // outputs 0 to 3 and 8 to 11
  __m256i high = *right;
  for (int i = 0; i < pairs.count; ++i) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + pairs.first[i]));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + pairs.second[i]));
    low = Simd::Dot(low, _mm256_unpacklo_epi16(a, b), pairs.levels[i]);
    high = Simd::Dot(high, _mm256_unpackhi_epi16(a, b), pairs.levels[i]);
  }
  *left = _mm256_permute2x128_si256(low, high, 0x20);
  *right = _mm256_permute2x128_si256(low, high, 0x31);
}

// Stride 2: neighbouring taps are next to each other as they are.
inline void Columns2(const std::int16_t* from, const TapPairs& pairs, __m256i* left, __m256i* right) {
  for (int i = 0; i < pairs.count; ++i) {
    const std::int16_t* const at = from + pairs.first[i];
    *left = Simd::Dot(*left, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), pairs.levels[i]);
    *right = Simd::Dot(*right, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 16)), pairs.levels[i]);
  }
}

inline void DepthwiseAvx2(const DepthwiseCall& call) {
  const std::int64_t stride = call.stride[1];
  const std::int64_t width = (call.kernel[1] + 3) / 4 * 4;
  const bool possible = stride == 1 || (stride == 2 && call.dilation[1] == 1);
  if (!possible || call.kernel[0] > 2 * TapPairs::kMost || call.kernel[0] * width > 2 * TapPairs::kMost) {
    Depthwise<std::int16_t>(call);
    return;
  }
  TapPairs pairs;
  for (std::int64_t ky = 0; ky < call.kernel[0]; ++ky) {
    for (std::int64_t kx = 0; kx < call.kernel[1]; kx += 2) {
      const std::int8_t* const taps = call.taps + ky * width + kx;
      const std::int64_t at = ky * call.dilation[0] * call.plane_width + kx * call.dilation[1];
      // The second tap of the last pair may be beyond the kernel: its level is 0, and it reads the first's activation.
      pairs.Add(at, taps[0], kx + 1 < call.kernel[1] ? at + call.dilation[1] : at, taps[1]);
    }
  }
  const auto* const plane = reinterpret_cast<const std::int16_t*>(call.plane);
  for (std::int64_t y = 0; y < call.out_size[0]; ++y) {
    for (std::int64_t x = 0; x < call.out_size[1]; x += kColumns) {
      const std::int16_t* const from = plane + y * call.stride[0] * call.plane_width + x * stride;
      __m256i left = _mm256_set1_epi32(call.start);
      __m256i right = left;
      if (stride == 1) {
        Columns1(from, pairs, &left, &right);
      } else {
        Columns2(from, pairs, &left, &right);
      }
      StoreColumns(left, right, call, call.out_size[1] - x, call.y + y * call.out_size[1] + x);
    }
  }
}

#endif

}  // namespace
}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_DEPTHWISE_AVX2_H_
