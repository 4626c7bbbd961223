// Kernels for AVX2 with 256-bit VNNI.
#define POSTQUANT_LUT_AVXVNNI 1
#include <cstdint>

#include "lut_body.h"
#include "lut_depthwise_avx2.h"
#include "lut_gemm.h"
#include "lut_simd_avx2.h"
#include "lut_table.h"

namespace postquant::lut {
namespace {

constexpr KernelTable MakeTable() {
  KernelTable table = BasicTable<Simd, std::uint8_t>(Isa::kAvxVnni, Activation::kUnsigned);
  table.gemv = Gemv<Simd>;
  table.gemv_rows = 4;
  table.depthwise = DepthwiseAvx2;
  table.macs_per_ns = 200.0;
  return table;
}

}  // namespace

const KernelTable& AvxVnniTable() {
  static constexpr KernelTable kTable = MakeTable();
  return kTable;
}

}  // namespace postquant::lut
