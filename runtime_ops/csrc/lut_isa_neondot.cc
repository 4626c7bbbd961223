// Kernels for AArch64 with the dot product instructions. Both factors are signed, so uint8 activations are shifted.
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "lut_body.h"
#include "lut_depthwise.h"
#include "lut_gemm.h"
#include "lut_table.h"

namespace postquant::lut {
namespace {

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kVectors = 4;
  static constexpr int kRowTile = 6;
  static constexpr int kElements = 4;
  using Sums = int32x4_t;
  using Words = int8x16_t;
  using Codes = uint8x16_t;
  using Table = int8x16_t;

  static Sums LoadSums(const std::int32_t* p) { return vld1q_s32(p); }
  static Sums Zero() { return vdupq_n_s32(0); }
  static Sums Add(Sums a, Sums b) { return vaddq_s32(a, b); }
  static Words LoadWords(const std::uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
  static Words Spread(const std::uint8_t* p) {
    std::int32_t word;
    std::memcpy(&word, p, sizeof word);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
  }
  static Sums Dot(Sums sums, Words x, Words w) { return vdotq_s32(sums, x, w); }
  static Table LoadTable(const std::int8_t* levels) { return vld1q_s8(levels); }
  static Codes LoadCodes(const std::uint8_t* p) { return vld1q_u8(p); }

  template <int Bits, int Part>
  static Words Decode(Codes codes, Table table) {
    // The table repeats its levels: of two bits only the lowest two of the four that remain matter.
    if constexpr (Part > 0) {
      codes = vshrq_n_u8(codes, Bits * Part);
    }
    return vqtbl1q_s8(table, vandq_u8(codes, vdupq_n_u8(0x0f)));
  }

  static void StoreRow(const Sums (&sums)[kVectors], const float* factor, const OutputNumbers& numbers, int outputs,
                       std::uint8_t* y) {
    constexpr int kWidth = kLanes * kVectors;
    std::int32_t row[kWidth];
    for (int v = 0; v < kVectors; ++v) {
      vst1q_s32(row + v * kLanes, sums[v]);
    }
    if (outputs >= kWidth) {
      RequantizeRow(row, factor, kWidth, numbers, y);
    } else {
      RequantizeRow(row, factor, outputs, numbers, y);
    }
  }

  static void StoreFloats(const Sums (&sums)[kVectors], const float* factor, const float* bias, int outputs,
                          float* y) {
    constexpr int kWidth = kLanes * kVectors;
    std::int32_t row[kWidth];
    for (int v = 0; v < kVectors; ++v) {
      vst1q_s32(row + v * kLanes, sums[v]);
    }
    ScaleRow(row, factor, bias, outputs < kWidth ? outputs : kWidth, y);
  }
};

constexpr KernelTable MakeTable() {
  KernelTable table = BasicTable<Simd, std::int8_t>(Isa::kNeonDot, Activation::kSigned);
  table.gemv = Gemv<Simd>;
  table.gemv_rows = 4;
  table.depthwise = Depthwise<std::int8_t>;
  table.macs_per_ns = 60.0;
  return table;
}

}  // namespace

const KernelTable& NeonDotTable() {
  static constexpr KernelTable kTable = MakeTable();
  return kTable;
}

}  // namespace postquant::lut
