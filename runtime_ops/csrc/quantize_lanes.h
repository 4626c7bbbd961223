// Registers of the quantizers, for sets that have them; elsewhere POSTQUANT_LANES is not defined and plain loops serve.
// Compiled once per instruction set, in an anonymous namespace.
//
//     kLanes                     values in a register
//     Floats, Ints               float32, int32
//     Limited(v, low, high)      not a number becomes `low`
//     Nearest, Below, Real       to an integer, half to even; to the integer below; back
//     Larger, Smaller(a, b)      of two magnitudes; a >= 0
//     AnyAbove, AnyBelow         whether one is above or below a limit
//     AtLeastZero                not a number becomes 0
//     Raised(v, a, b)            v, plus 1 where a > b
//     Doubles                    float64, half as many
//     Table, LookUp, Gather      up to kSmallTable numbers by the low bits of an integer; any from memory
//     Shorts, LowPairs, HighPairs, Pack
//                                int16, twice as many; two registers of them interleaved; integers to int16 (the reverse)
//     AddProducts                sums of products of pairs
//     StorePairs                 two registers interleaved, in order
//     StoreBytes                 integers of four registers, plus `shift`: bytes, saturated
//     LoadBytes                  bytes as integers
//     Difference(a, b, limit)    bytes a - b as int16, at most `limit` in size
//     Bytes, Sixteen, Choose     uint8, four times as many; the same 16 in each part of 16; those by the low bits of
//                                others
//     Signed                     bytes minus 128, whose order as int8 is that of the bytes
//     Raised(v, a, b, step)      v, plus `step` where a > b as int8
#ifndef POSTQUANT_CSRC_QUANTIZE_LANES_H_
#define POSTQUANT_CSRC_QUANTIZE_LANES_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "quantize_kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#define POSTQUANT_LANES 1
#endif

namespace postquant::quantize {
namespace {

#if defined(__AVX512F__)

struct Lanes {
  static constexpr std::size_t kLanes = 16;
  using Floats = __m512;
  using Ints = __m512i;
  using Doubles = __m512d;

  static Floats Load(const float* p) { return _mm512_loadu_ps(p); }
  static Floats Set(float value) { return _mm512_set1_ps(value); }
  static Floats Multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats Add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats Subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats Limited(Floats v, Floats low, Floats high) { return _mm512_min_ps(_mm512_max_ps(v, low), high); }
  static Floats Larger(Floats a, Floats b) { return _mm512_range_ps(a, b, 0x0b); }
  static Floats Smaller(Floats a, Floats b) { return _mm512_range_ps(a, b, 0x0a); }
  static bool AnyAbove(Floats v, Floats limit) { return _mm512_cmp_ps_mask(v, limit, _CMP_GT_OQ) != 0; }
  static bool AnyBelow(Floats v, Floats limit) { return _mm512_cmp_ps_mask(v, limit, _CMP_LT_OQ) != 0; }
  static Ints Nearest(Floats v) { return _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Ints Below(Floats v) { return _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static Floats Real(Ints v) { return _mm512_cvtepi32_ps(v); }
  static Ints Raised(Ints v, Floats a, Floats b) {
    return _mm512_mask_add_epi32(v, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), v, _mm512_set1_epi32(1));
  }
  static Floats AtLeastZero(Floats v) { return _mm512_max_ps(v, _mm512_setzero_ps()); }
  static Floats LoadShort(const std::int16_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  static void StoreBytes(const Ints (&v)[4], std::int32_t shift, std::uint8_t* y) {
    const __m512i shifts = _mm512_set1_epi16(static_cast<std::int16_t>(shift));
    const __m512i left = _mm512_add_epi16(_mm512_packs_epi32(v[0], v[1]), shifts);
    const __m512i right = _mm512_add_epi16(_mm512_packs_epi32(v[2], v[3]), shifts);
    // Packing works within 128 bits: group 4 * lane + register goes to 4 * register + lane.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(y, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(left, right)));
  }

  static Doubles LoadDoubles(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static Doubles AddDoubles(Doubles a, Doubles b) { return _mm512_add_pd(a, b); }
  // The square of a float32 is exact in float64, so that it does not matter when it is rounded.
  static Doubles AddSquares(Doubles sum, Doubles v) { return _mm512_fmadd_pd(v, v, sum); }
  static double Total(Doubles v) { return _mm512_reduce_add_pd(v); }
  static float Largest(Floats v) { return _mm512_reduce_max_ps(v); }

  static constexpr std::size_t kRanks = 8;  // sums of two registers that fit in all registers
  using Shorts = __m512i;
  static Shorts LoadShorts(const std::int16_t* p) { return _mm512_loadu_si512(p); }
  static Shorts NoShorts() { return _mm512_setzero_si512(); }
  static Shorts SetPair(const std::int16_t* p) {
    std::int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Shorts LowPairs(Shorts a, Shorts b) { return _mm512_unpacklo_epi16(a, b); }
  static Shorts HighPairs(Shorts a, Shorts b) { return _mm512_unpackhi_epi16(a, b); }
  static Shorts Pack(Ints low, Ints high) { return _mm512_packs_epi32(low, high); }
  static Ints AddProducts(Ints sums, Shorts a, Shorts b) { return _mm512_dpwssd_epi32(sums, a, b); }
  static void StorePairs(Shorts a, Shorts b, std::int16_t* p) {
    const __m512i low = _mm512_unpacklo_epi16(a, b);
    const __m512i high = _mm512_unpackhi_epi16(a, b);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi64(low, first, high));
    _mm512_storeu_si512(p + 2 * kLanes, _mm512_permutex2var_epi64(low, second, high));
  }
  static void Store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Ints LoadInts(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static Ints LoadBytes(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Ints SetInt(std::int32_t value) { return _mm512_set1_epi32(value); }
  static Ints SubtractInts(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  static Shorts Difference(const std::uint8_t* a, const std::uint8_t* b, std::int16_t limit) {
    const __m512i wide_a = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
    const __m512i wide_b = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
    const __m512i least = _mm512_set1_epi16(static_cast<std::int16_t>(-limit));
    return _mm512_min_epi16(_mm512_max_epi16(_mm512_sub_epi16(wide_a, wide_b), least), _mm512_set1_epi16(limit));
  }
  static void StoreShorts(std::int16_t* p, Shorts v) { _mm512_storeu_si512(p, v); }

  using Bytes = __m512i;
  static constexpr std::size_t kBytes = 64;
  static Bytes LoadRow(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static void StoreRow(std::uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
  static Bytes SetByte(std::int8_t value) { return _mm512_set1_epi8(value); }
  static Bytes AddBytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
  static Bytes Sixteen(const void* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static Bytes Choose(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
  static Bytes Signed(Bytes v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
  static Bytes Raised(Bytes v, Bytes a, Bytes b, std::int8_t step) {
    return _mm512_mask_add_epi8(v, _mm512_cmpgt_epi8_mask(a, b), v, _mm512_set1_epi8(step));
  }
  static void StoreInts(std::int32_t* p, Ints v) { _mm512_storeu_si512(p, v); }

  static constexpr std::int32_t kSmallTable = 16;
  using Table = __m512;
  static Table LoadTable(const float* table) { return _mm512_loadu_ps(table); }
  static Floats LookUp(Ints v, const Table& table) { return _mm512_permutexvar_ps(v, table); }
  static Floats Gather(Ints v, std::int32_t first, const float* table) {
    return _mm512_i32gather_ps(_mm512_add_epi32(v, _mm512_set1_epi32(first)), table, 4);
  }
};

#elif defined(__AVX2__)

struct Lanes {
  static constexpr std::size_t kLanes = 8;
  using Floats = __m256;
  using Ints = __m256i;
  using Doubles = __m256d;

  static Floats Load(const float* p) { return _mm256_loadu_ps(p); }
  static Floats Set(float value) { return _mm256_set1_ps(value); }
  static Floats Multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats Add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats Subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats Limited(Floats v, Floats low, Floats high) { return _mm256_min_ps(_mm256_max_ps(v, low), high); }
  static Floats Magnitude(Floats v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), v); }
  static Floats Larger(Floats a, Floats b) { return _mm256_max_ps(Magnitude(b), a); }  // not a number: a
  static Floats Smaller(Floats a, Floats b) { return _mm256_min_ps(Magnitude(b), a); }
  static bool AnyAbove(Floats v, Floats limit) { return _mm256_movemask_ps(_mm256_cmp_ps(v, limit, _CMP_GT_OQ)) != 0; }
  static bool AnyBelow(Floats v, Floats limit) { return _mm256_movemask_ps(_mm256_cmp_ps(v, limit, _CMP_LT_OQ)) != 0; }
  static Ints Nearest(Floats v) { return _mm256_cvtps_epi32(v); }
  static Ints Below(Floats v) { return _mm256_cvttps_epi32(_mm256_floor_ps(v)); }
  static Floats Real(Ints v) { return _mm256_cvtepi32_ps(v); }
  static Ints Raised(Ints v, Floats a, Floats b) {
    return _mm256_sub_epi32(v, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static Floats AtLeastZero(Floats v) { return _mm256_max_ps(v, _mm256_setzero_ps()); }
  static Floats LoadShort(const std::int16_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void StoreBytes(const Ints (&v)[4], std::int32_t shift, std::uint8_t* y) {
    const __m256i shifts = _mm256_set1_epi16(static_cast<std::int16_t>(shift));
    const __m256i left = _mm256_add_epi16(_mm256_packs_epi32(v[0], v[1]), shifts);
    const __m256i right = _mm256_add_epi16(_mm256_packs_epi32(v[2], v[3]), shifts);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(left, right), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), bytes);
  }

  static Doubles LoadDoubles(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static Doubles AddDoubles(Doubles a, Doubles b) { return _mm256_add_pd(a, b); }
  static Doubles AddSquares(Doubles sum, Doubles v) { return _mm256_add_pd(sum, _mm256_mul_pd(v, v)); }
  static double Total(Doubles v) {
    double parts[4];
    _mm256_storeu_pd(parts, v);
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
  static float Largest(Floats v) {
    float parts[kLanes];
    _mm256_storeu_ps(parts, v);
    float largest = parts[0];
    for (const float part : parts) {
      largest = part > largest ? part : largest;
    }
    return largest;
  }

  static constexpr std::size_t kRanks = 4;  // sums of two registers that fit in all registers
  using Shorts = __m256i;
  static Shorts LoadShorts(const std::int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Shorts NoShorts() { return _mm256_setzero_si256(); }
  static Shorts SetPair(const std::int16_t* p) {
    std::int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm256_set1_epi32(pair);
  }
  static Shorts LowPairs(Shorts a, Shorts b) { return _mm256_unpacklo_epi16(a, b); }
  static Shorts HighPairs(Shorts a, Shorts b) { return _mm256_unpackhi_epi16(a, b); }
  static Shorts Pack(Ints low, Ints high) { return _mm256_packs_epi32(low, high); }
  static Ints AddProducts(Ints sums, Shorts a, Shorts b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }
  static void StorePairs(Shorts a, Shorts b, std::int16_t* p) {
    const __m256i low = _mm256_unpacklo_epi16(a, b);
    const __m256i high = _mm256_unpackhi_epi16(a, b);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 2 * kLanes), _mm256_permute2x128_si256(low, high, 0x31));
  }
  static void Store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static Ints LoadInts(const std::int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Ints LoadBytes(const std::uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Ints SetInt(std::int32_t value) { return _mm256_set1_epi32(value); }
  static Ints SubtractInts(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  static Shorts Difference(const std::uint8_t* a, const std::uint8_t* b, std::int16_t limit) {
    const __m256i wide_a = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
    const __m256i wide_b = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
    const __m256i least = _mm256_set1_epi16(static_cast<std::int16_t>(-limit));
    return _mm256_min_epi16(_mm256_max_epi16(_mm256_sub_epi16(wide_a, wide_b), least), _mm256_set1_epi16(limit));
  }
  static void StoreShorts(std::int16_t* p, Shorts v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

  using Bytes = __m256i;
  static constexpr std::size_t kBytes = 32;
  static Bytes LoadRow(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void StoreRow(std::uint8_t* p, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Bytes SetByte(std::int8_t value) { return _mm256_set1_epi8(value); }
  static Bytes AddBytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
  static Bytes Sixteen(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static Bytes Choose(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
  static Bytes Signed(Bytes v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }
  static Bytes Raised(Bytes v, Bytes a, Bytes b, std::int8_t step) {
    return _mm256_add_epi8(v, _mm256_and_si256(_mm256_cmpgt_epi8(a, b), _mm256_set1_epi8(step)));
  }
  static void StoreInts(std::int32_t* p, Ints v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

  static constexpr std::int32_t kSmallTable = 16;
  struct Table {
    __m256 low;
    __m256 high;
  };
  static Table LoadTable(const float* table) { return {_mm256_loadu_ps(table), _mm256_loadu_ps(table + kLanes)}; }
  static Floats LookUp(Ints v, const Table& table) {
    const __m256 in_high = _mm256_castsi256_ps(_mm256_slli_epi32(v, 28));  // bit 3 becomes the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, v), _mm256_permutevar8x32_ps(table.high, v), in_high);
  }
  static Floats Gather(Ints v, std::int32_t first, const float* table) {
    return _mm256_i32gather_ps(table, _mm256_add_epi32(v, _mm256_set1_epi32(first)), 4);
  }
};

#endif

#if defined(POSTQUANT_LANES)
constexpr std::size_t kRegisters = 4;  // whose integers are stored as bytes together
constexpr std::size_t kGroup = kRegisters * Lanes::kLanes;
#endif

}  // namespace
}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_QUANTIZE_LANES_H_
