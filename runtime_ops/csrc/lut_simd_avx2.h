// 256-bit registers: AVX2 with 16-bit products (exact: the 8-bit products of AVX2 saturate), or VNNI where the
// including file defines POSTQUANT_LUT_AVXVNNI.
#ifndef POSTQUANT_CSRC_LUT_SIMD_AVX2_H_
#define POSTQUANT_CSRC_LUT_SIMD_AVX2_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lut_table.h"

namespace postquant::lut {
namespace {

// Requantizes 16 sums. Products are limited from above before they become integers; from below the conversion gives the
// least integer, and the saturating steps down to bytes do the rest.
inline __m128i Requantize16(__m256i left, __m256i right, __m256 left_factor, __m256 right_factor,
                            const OutputNumbers& numbers) {
  const __m256 high = _mm256_set1_ps(static_cast<float>(numbers.high - numbers.zero_point));
  const __m256 left_product = _mm256_mul_ps(_mm256_cvtepi32_ps(left), left_factor);
  const __m256 right_product = _mm256_mul_ps(_mm256_cvtepi32_ps(right), right_factor);
  const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_min_ps(left_product, high)),
                                            _mm256_cvtps_epi32(_mm256_min_ps(right_product, high)));
  const __m256i shifted = _mm256_adds_epi16(packed, _mm256_set1_epi16(static_cast<std::int16_t>(numbers.zero_point)));
  // Packing works within 128 bits.
  const __m256i ordered = _mm256_permute4x64_epi64(shifted, 0xd8);
  const __m128i low = _mm256_castsi256_si128(ordered);
  const __m128i top = _mm256_extracti128_si256(ordered, 1);
  return numbers.low < 0 ? _mm_packs_epi16(low, top) : _mm_packus_epi16(low, top);
}

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 2;
  static constexpr int kRowTile = 6;
  using Sums = __m256i;
  using Words = __m256i;
  using Table = __m256i;

  static Sums LoadSums(const std::int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Sums Zero() { return _mm256_setzero_si256(); }
  static Sums Add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
  static Words LoadWords(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Words Spread(const std::uint8_t* p) {
    std::int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm256_set1_epi32(word);
  }
  static Table LoadTable(const std::int8_t* levels) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels));
  }

#if defined(POSTQUANT_LUT_AVXVNNI)
  static constexpr int kElements = 4;
  using Codes = __m256i;
  static Sums Dot(Sums sums, Words x, Words w) { return _mm256_dpbusd_avx_epi32(sums, x, w); }
  static Codes LoadCodes(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  template <int Bits, int Part>
  static Words Decode(Codes codes, Table table) {
    // The table repeats its levels: of two bits only the lowest two of the four that remain matter.
    return _mm256_shuffle_epi8(table,
                               _mm256_and_si256(_mm256_srli_epi16(codes, Bits * Part), _mm256_set1_epi8(0x0f)));
  }
#else
  static constexpr int kElements = 2;
  using Codes = __m128i;
  static Sums Dot(Sums sums, Words x, Words w) { return _mm256_add_epi32(sums, _mm256_madd_epi16(x, w)); }
  static Codes LoadCodes(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  template <int Bits, int Part>
  static Words Decode(Codes codes, Table table) {
    const __m128i index = _mm_and_si128(_mm_srli_epi16(codes, Bits * Part), _mm_set1_epi8(0x0f));
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(_mm256_castsi256_si128(table), index));
  }
#endif

  static void StoreRow(const Sums (&sums)[kVectors], const float* factor, const OutputNumbers& numbers, int outputs,
                       std::uint8_t* y) {
    const __m256 left = _mm256_loadu_ps(factor);
    const __m128i row = Requantize16(sums[0], sums[1], left, _mm256_loadu_ps(factor + kLanes), numbers);
    if (outputs >= kLanes * kVectors) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y), row);
    } else {
      std::uint8_t all[16];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(all), row);
      std::memcpy(y, all, static_cast<std::size_t>(outputs));
    }
  }

  static void StoreFloats(const Sums (&sums)[kVectors], const float* factor, const float* bias, int outputs,
                          float* y) {
    float row[kLanes * kVectors];
    float* const to = outputs >= kLanes * kVectors ? y : row;
    for (int v = 0; v < kVectors; ++v) {
      const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[v]), _mm256_loadu_ps(factor + v * kLanes));
      _mm256_storeu_ps(to + v * kLanes, _mm256_add_ps(product, _mm256_loadu_ps(bias + v * kLanes)));
    }
    if (to == row) {
      std::memcpy(y, row, static_cast<std::size_t>(outputs) * sizeof(float));
    }
  }
};

}  // namespace
}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_SIMD_AVX2_H_
