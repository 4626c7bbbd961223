// Kernels for AMX: the matrix product in tiles of 16 x 16 sums and 64 activations; the rest as AVX-512 with VBMI.
#define POSTQUANT_LUT_VBMI 1
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lut_body.h"
#include "lut_depthwise_avx512.h"
#include "lut_direct_vbmi.h"
#include "lut_gemm.h"
#include "lut_planar_avx512.h"
#include "lut_simd_avx512.h"
#include "lut_table.h"

namespace postquant::lut {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;   // of a row of activations
constexpr int kBlockRows = 2 * kTileRows;
constexpr std::int64_t kPackedBytes = 2048;  // activations of a row that are packed at a time
constexpr std::int64_t kPackedStride = kPackedBytes + kTileBytes;  // not a power of two: spreads over the cache's sets
constexpr std::int64_t kPanelRow = static_cast<std::int64_t>(kWord) * PanelWidth<Simd>();

// Tiles 0 to 3: sums of (rows, outputs); 4 and 5: activations; 6 and 7: weights.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// What is multiplied: 16 or 32 rows, 16 or 32 of the panel's outputs.
struct Shape {
  bool second_rows;
  bool second_outputs;
};

inline void ClearTiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void MultiplyTiles(const Shape& shape, const std::uint8_t* x0, std::int64_t stride0, const std::uint8_t* x1,
                          std::int64_t stride1, const std::uint8_t* panel) {
  _tile_loadd(6, panel, kPanelRow);
  _tile_loadd(4, x0, stride0);
  _tile_dpbusd(0, 4, 6);
  if (shape.second_outputs) {
    _tile_loadd(7, panel + kTileBytes, kPanelRow);
    _tile_dpbusd(1, 4, 7);
  }
  if (shape.second_rows) {
    _tile_loadd(5, x1, stride1);
    _tile_dpbusd(2, 5, 6);
    if (shape.second_outputs) {
      _tile_dpbusd(3, 5, 7);
    }
  }
}

inline void StoreTiles(const Shape& shape, std::int32_t* sums) {
  constexpr int kWidth = PanelWidth<Simd>();
  constexpr int kStride = kWidth * static_cast<int>(sizeof(std::int32_t));
  _tile_stored(0, sums, kStride);
  if (shape.second_outputs) {
    _tile_stored(1, sums + 16, kStride);
  }
  if (shape.second_rows) {
    _tile_stored(2, sums + kTileRows * kWidth, kStride);
    if (shape.second_outputs) {
      _tile_stored(3, sums + kTileRows * kWidth + 16, kStride);
    }
  }
}

// Copies activations [begin, end) of one row, its runs one after another. Writes up to 63 bytes more.
inline void PackRow(const GemmCall& call, const std::uint8_t* row, std::int64_t begin, std::int64_t end,
                    std::uint8_t* to) {
  std::int64_t at = 0;
  for (std::int64_t i = 0; i < call.runs[0]; ++i) {
    for (std::int64_t j = 0; j < call.runs[1]; ++j, at += call.run_bytes) {
      const std::int64_t from = at < begin ? begin : at;
      const std::int64_t until = at + call.run_bytes < end ? at + call.run_bytes : end;
      const std::uint8_t* const run = row + i * call.run_step[0] + j * call.run_step[1];
      for (std::int64_t k = from; k < until; k += kTileBytes) {
        _mm512_storeu_si512(to + (k - begin), _mm512_loadu_si512(run + (k - at)));
      }
    }
  }
}

// The distance of 16 rows that can be loaded as one tile where they are, or 0.
inline std::int64_t TileStride(const std::uint8_t* const* rows, int count) {
  if (count < kTileRows) {
    return 0;
  }
  const std::int64_t stride = rows[1] - rows[0];
  for (int i = 2; i < kTileRows; ++i) {
    if (rows[i] - rows[i - 1] != stride) {
      return 0;
    }
  }
  return stride;
}

inline void MultiplyInPlace(const GemmCall& call, const Shape& shape, const std::uint8_t* x0, std::int64_t stride0,
                            const std::uint8_t* x1, std::int64_t stride1, const std::uint8_t* panel) {
  for (std::int64_t i = 0; i < call.runs[0]; ++i) {
    for (std::int64_t j = 0; j < call.runs[1]; ++j) {
      const std::int64_t offset = i * call.run_step[0] + j * call.run_step[1];
      for (std::int64_t k = offset; k < offset + call.run_bytes; k += kTileBytes) {
        MultiplyTiles(shape, x0 + k, stride0, x1 + k, stride1, panel);
        panel += kTileRows * kPanelRow;
      }
    }
  }
}

inline void BlockAmx(const GemmCall& call, int first_row, std::uint8_t* scratch) {
  const std::uint8_t* const* const rows = call.rows + first_row;
  const int count = call.row_count - first_row < kBlockRows ? call.row_count - first_row : kBlockRows;
  const bool second_rows = count > kTileRows;
  const std::int64_t total = call.runs[0] * call.runs[1] * call.run_bytes;
  const std::int64_t stride0 = TileStride(rows, count);
  const std::int64_t stride1 = second_rows ? TileStride(rows + kTileRows, count - kTileRows) : stride0;
  const bool in_place = call.run_bytes % kTileBytes == 0 && stride0 != 0 && stride1 != 0;
  alignas(64) std::int32_t sums[kBlockRows * PanelWidth<Simd>()];
  for (int n = 0; n < call.out.outputs; n += 32) {
    const Shape shape = {second_rows, call.out.outputs - n > 16};
    const std::uint8_t* panel = call.panel + n * static_cast<int>(kWord);
    ClearTiles();
    if (in_place) {
      MultiplyInPlace(call, shape, rows[0], stride0, second_rows ? rows[kTileRows] : rows[0], stride1, panel);
    } else {
      for (std::int64_t begin = 0; begin < total; begin += kPackedBytes) {
        const std::int64_t end = begin + kPackedBytes < total ? begin + kPackedBytes : total;
        if (n == 0 || total > kPackedBytes) {
          for (int r = 0; r < count; ++r) {
            PackRow(call, rows[r], begin, end, scratch + r * kPackedStride);
          }
        }
        for (std::int64_t k = 0; k < end - begin; k += kTileBytes) {
          MultiplyTiles(shape, scratch + k, kPackedStride, scratch + kTileRows * kPackedStride + k, kPackedStride,
                        panel);
          panel += kTileRows * kPanelRow;
        }
      }
    }
    StoreTiles(shape, sums + n);
  }
  for (int r = 0; r < count; ++r) {
    Simd::Sums row[Simd::kVectors];
    for (int v = 0; v < Simd::kVectors; ++v) {
      row[v] = Simd::Add(Simd::LoadSums(sums + r * PanelWidth<Simd>() + v * Simd::kLanes),
                         Simd::LoadSums(call.out.start + v * Simd::kLanes));
    }
    Store<Simd>(call.out, first_row + r, row);
  }
}

// Configures the tiles for one call: nothing is assumed about what other code on this thread did with them.
void GemmAmx(const GemmCall& call) {
  alignas(64) std::uint8_t scratch[kBlockRows * kPackedStride];
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int row = 0; row < call.row_count; row += kBlockRows) {
    BlockAmx(call, row, scratch);
  }
  _tile_release();
}

constexpr KernelTable MakeTable() {
  KernelTable table = BasicTable<Simd, std::uint8_t>(Isa::kAmx, Activation::kUnsigned);
  table.gemv = Gemv<Simd>;
  table.gemv_rows = 4;
  table.gemm = GemmAmx;
  table.row_tile = kBlockRows;
  table.tight = true;
  table.panel_words = kTileRows;
  table.direct_bytes = kTileBytes;
  table.depthwise = DepthwiseVnni;
  table.direct = DirectVbmi;
  table.planar = Planar;
  table.interleave = Interleave;
  table.planar_inputs = 128;
  table.planar_weights = 12000;
  table.macs_per_ns = 1200.0;
  return table;
}

}  // namespace

const KernelTable& AmxTable() {
  static constexpr KernelTable kTable = MakeTable();
  return kTable;
}

}  // namespace postquant::lut
