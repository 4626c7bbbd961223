// Kernels for AVX2.
#include <cstdint>

#include "lut_body.h"
#include "lut_depthwise_avx2.h"
#include "lut_gemm.h"
#include "lut_simd_avx2.h"
#include "lut_table.h"

namespace postquant::lut {
namespace {

constexpr KernelTable MakeTable() {
  KernelTable table = BasicTable<Simd, std::int16_t>(Isa::kAvx2, Activation::kCentered);
  table.gemv = Gemv<Simd>;
  table.gemv_rows = 4;
  table.depthwise = DepthwiseAvx2;
  table.macs_per_ns = 50.0;
  return table;
}

}  // namespace

const KernelTable& Avx2Table() {
  static constexpr KernelTable kTable = MakeTable();
  return kTable;
}

}  // namespace postquant::lut
