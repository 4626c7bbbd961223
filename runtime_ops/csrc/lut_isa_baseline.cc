// Kernels for every machine: SSE2 where the platform has it, plain C++ elsewhere.
#include <cstdint>
#include <cstring>

#include "lut_body.h"
#include "lut_depthwise.h"
#include "lut_gemm.h"
#include "lut_table.h"

namespace postquant::lut {
namespace {

#if defined(POSTQUANT_LUT_SSE2)

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kVectors = 2;
  static constexpr int kRowTile = 6;
  using Sums = __m128i;
  using Words = __m128i;

  static Sums LoadSums(const std::int32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static Words LoadWords(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static Words Spread(const std::uint8_t* p) {
    std::int32_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm_set1_epi32(word);
  }
  static Sums Dot(Sums sums, Words x, Words w) { return _mm_add_epi32(sums, _mm_madd_epi16(x, w)); }
  static void StoreSums(std::int32_t* p, Sums sums) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), sums); }
#else

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kVectors = 2;
  static constexpr int kRowTile = 4;
  struct Sums {
    std::int32_t lane[kLanes];
  };
  struct Words {
    std::int16_t element[2 * kLanes];
  };

  static Sums LoadSums(const std::int32_t* p) {
    Sums sums;
    std::memcpy(&sums, p, sizeof sums);
    return sums;
  }
  static Words LoadWords(const std::uint8_t* p) {
    Words words;
    std::memcpy(&words, p, sizeof words);
    return words;
  }
  static Words Spread(const std::uint8_t* p) {
    Words words;
    for (int i = 0; i < kLanes; ++i) {
      std::memcpy(words.element + 2 * i, p, kWord);
    }
    return words;
  }
  // Sums wrap around, as they do in the instruction sets.
  static Sums Dot(Sums sums, Words x, Words w) {
    for (int i = 0; i < kLanes; ++i) {
      const std::int32_t product = x.element[2 * i] * w.element[2 * i] + x.element[2 * i + 1] * w.element[2 * i + 1];
      sums.lane[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(sums.lane[i]) +
                                               static_cast<std::uint32_t>(product));
    }
    return sums;
  }
  static void StoreSums(std::int32_t* p, Sums sums) { std::memcpy(p, &sums, sizeof sums); }
#endif

  static void StoreRow(const Sums (&sums)[kVectors], const float* factor, const OutputNumbers& numbers, int outputs,
                       std::uint8_t* y) {
    std::int32_t row[kLanes * kVectors];
    for (int v = 0; v < kVectors; ++v) {
      StoreSums(row + v * kLanes, sums[v]);
    }
    RequantizeRow(row, factor, outputs < kLanes * kVectors ? outputs : kLanes * kVectors, numbers, y);
  }

  static void StoreFloats(const Sums (&sums)[kVectors], const float* factor, const float* bias, int outputs,
                          float* y) {
    std::int32_t row[kLanes * kVectors];
    for (int v = 0; v < kVectors; ++v) {
      StoreSums(row + v * kLanes, sums[v]);
    }
    ScaleRow(row, factor, bias, outputs < kLanes * kVectors ? outputs : kLanes * kVectors, y);
  }
};

constexpr KernelTable MakeTable() {
  KernelTable table = BasicTable<Simd, std::int16_t>(Isa::kBaseline, Activation::kCentered);
  table.depthwise = Depthwise<std::int16_t>;
  table.macs_per_ns = 10.0;
  return table;
}

}  // namespace

const KernelTable& BaselineTable() {
  static constexpr KernelTable kTable = MakeTable();
  return kTable;
}

}  // namespace postquant::lut
