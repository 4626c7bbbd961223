// 512-bit registers with VNNI, and VBMI's byte permutation where the including file defines POSTQUANT_LUT_VBMI.
#ifndef POSTQUANT_CSRC_LUT_SIMD_AVX512_H_
#define POSTQUANT_CSRC_LUT_SIMD_AVX512_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lut_table.h"

namespace postquant::lut {
namespace {

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 4;
  static constexpr int kRowTile = 6;
  static constexpr int kElements = 4;
  using Sums = __m512i;
  using Words = __m512i;
  using Codes = __m512i;
  using Table = __m512i;

  static Sums LoadSums(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static Sums Zero() { return _mm512_setzero_si512(); }
  static Sums Add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
  static Words LoadWords(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static Words Spread(const std::uint8_t* p) {
    std::int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
  }
  static Sums Dot(Sums sums, Words x, Words w) { return _mm512_dpbusd_epi32(sums, x, w); }
  static Table LoadTable(const std::int8_t* levels) { return _mm512_loadu_si512(levels); }
  static Codes LoadCodes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }

  // The table repeats its levels, so that bits above those of the code do no harm: VBMI looks at six bits.
  template <int Bits, int Part>
  static Words Decode(Codes codes, Table table) {
    const __m512i shifted = Part == 0 ? codes : _mm512_srli_epi16(codes, Bits * Part);
#if defined(POSTQUANT_LUT_VBMI)
    return _mm512_permutexvar_epi8(shifted, table);
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(shifted, _mm512_set1_epi8(0x0f)));
#endif
  }

  // Products are limited from above before they become integers; from below the conversion gives the least integer,
  // and the saturating steps down to bytes do the rest.
  static __m512i Requantize(const Sums (&sums)[kVectors], const __m512 (&factors)[kVectors],
                            const OutputNumbers& numbers) {
    const __m512 high = _mm512_set1_ps(static_cast<float>(numbers.high - numbers.zero_point));
    __m512i rounded[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[v]), factors[v]);
      rounded[v] = _mm512_cvtps_epi32(_mm512_min_ps(product, high));
    }
    const __m512i zero = _mm512_set1_epi16(static_cast<std::int16_t>(numbers.zero_point));
    const __m512i left = _mm512_adds_epi16(_mm512_packs_epi32(rounded[0], rounded[1]), zero);
    const __m512i right = _mm512_adds_epi16(_mm512_packs_epi32(rounded[2], rounded[3]), zero);
    const __m512i bytes = numbers.low < 0 ? _mm512_packs_epi16(left, right) : _mm512_packus_epi16(left, right);
    // Packing works within 128 bits: group 4 * lane + register goes to 4 * register + lane.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, bytes);
  }

  static void StoreBytes(__m512i row, int count, std::uint8_t* y) {
    if (count >= kLanes * kVectors) {
      _mm512_storeu_si512(y, row);
    } else {
      _mm512_mask_storeu_epi8(y, (__mmask64{1} << count) - 1, row);
    }
  }

  static void StoreRow(const Sums (&sums)[kVectors], const float* factor, const OutputNumbers& numbers, int outputs,
                       std::uint8_t* y) {
    __m512 factors[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      factors[v] = _mm512_loadu_ps(factor + v * kLanes);
    }
    StoreBytes(Requantize(sums, factors, numbers), outputs, y);
  }

  static void StoreFloats(const Sums (&sums)[kVectors], const float* factor, const float* bias, int outputs,
                          float* y) {
    for (int v = 0; v < kVectors && v * kLanes < outputs; ++v) {
      const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[v]), _mm512_loadu_ps(factor + v * kLanes));
      const __m512 result = _mm512_add_ps(product, _mm512_loadu_ps(bias + v * kLanes));
      const int count = outputs - v * kLanes;
      const __mmask16 mask = count >= kLanes ? __mmask16{0xffff} : static_cast<__mmask16>((1U << count) - 1U);
      _mm512_mask_storeu_ps(y + v * kLanes, mask, result);
    }
  }
};

}  // namespace
}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_SIMD_AVX512_H_
