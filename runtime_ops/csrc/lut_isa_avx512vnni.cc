// Kernels for AVX-512 with VNNI.
#include <cstdint>

#include "lut_body.h"
#include "lut_depthwise_avx512.h"
#include "lut_gemm.h"
#include "lut_planar_avx512.h"
#include "lut_simd_avx512.h"
#include "lut_table.h"

namespace postquant::lut {
namespace {

constexpr KernelTable MakeTable() {
  KernelTable table = BasicTable<Simd, std::uint8_t>(Isa::kAvx512Vnni, Activation::kUnsigned);
  table.gemv = Gemv<Simd>;
  table.gemv_rows = 4;
  table.depthwise = DepthwiseVnni;
  table.planar = Planar;
  table.interleave = Interleave;
  table.planar_inputs = 512;
  table.planar_weights = 160000;
  table.macs_per_ns = 300.0;
  return table;
}

}  // namespace

const KernelTable& Avx512VnniTable() {
  static constexpr KernelTable kTable = MakeTable();
  return kTable;
}

}  // namespace postquant::lut
