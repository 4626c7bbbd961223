// Register tiles of the matrix product and of the product of a few rows, for any instruction set.
//
// An instruction set is a type `Simd` with
//
//     kLanes, kVectors, kRowTile     sums in a register, registers across a panel, rows of a tile
//     kElements                      elements of a word
//     Sums, Words, Codes, Table      int32 sums, words of activations or weights, packed codes, the look-up table
//     LoadSums, Zero, Add            int32 sums
//     LoadWords, Spread              consecutive words, one word in all lanes
//     Dot(sums, activations, weights)
//     StoreRow(sums, factor, numbers, outputs, y)     requantizes kVectors registers
//     StoreFloats(sums, factor, bias, outputs, y)     the same with a float output
//
// and, for few rows straight from packed codes,
//
//     LoadTable, LoadCodes, Decode<bits, part>(codes, table)
#ifndef POSTQUANT_CSRC_LUT_GEMM_H_
#define POSTQUANT_CSRC_LUT_GEMM_H_

#include <cstdint>

#include "lut_body.h"
#include "lut_table.h"

namespace postquant::lut {
namespace {

template <typename Simd>
constexpr int PanelWidth() {
  return Simd::kLanes * Simd::kVectors;
}

// One row of finished sums.
template <typename Simd>
inline void Store(const RowOutput& out, int row, const typename Simd::Sums (&sums)[Simd::kVectors]) {
  if (out.bias == nullptr) {
    Simd::StoreRow(sums, out.factor, out.numbers, out.outputs, out.y + row * out.y_stride);
  } else {
    Simd::StoreFloats(sums, out.factor, out.bias, out.outputs, reinterpret_cast<float*>(out.y) + row * out.y_stride);
  }
}

// R rows of V of the panel's registers.
template <typename Simd, int R, int V>
void GemmTile(const GemmCall& call, int first_row) {
  typename Simd::Sums sums[R][Simd::kVectors];
  for (int v = 0; v < V; ++v) {
    const auto start = Simd::LoadSums(call.out.start + v * Simd::kLanes);
    for (int r = 0; r < R; ++r) {
      sums[r][v] = start;
    }
  }
  constexpr std::int64_t kStep = static_cast<std::int64_t>(kWord) * PanelWidth<Simd>();
  constexpr std::int64_t kRegister = static_cast<std::int64_t>(kWord) * Simd::kLanes;
  const std::uint8_t* panel = call.panel;
  const std::int64_t words = (call.run_bytes + 3) / 4;
  for (std::int64_t i = 0; i < call.runs[0]; ++i) {
    for (std::int64_t j = 0; j < call.runs[1]; ++j) {
      const std::int64_t offset = i * call.run_step[0] + j * call.run_step[1];
      const std::uint8_t* rows[R];
      for (int r = 0; r < R; ++r) {
        rows[r] = call.rows[first_row + r] + offset;
      }
      for (std::int64_t w = 0; w < words; ++w) {
        typename Simd::Words weights[V];
        for (int v = 0; v < V; ++v) {
          weights[v] = Simd::LoadWords(panel + v * kRegister);
        }
        for (int r = 0; r < R; ++r) {
          const typename Simd::Words x = Simd::Spread(rows[r] + static_cast<std::int64_t>(kWord) * w);
          for (int v = 0; v < V; ++v) {
            sums[r][v] = Simd::Dot(sums[r][v], x, weights[v]);
          }
        }
        panel += kStep;
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = V; v < Simd::kVectors; ++v) {
      sums[r][v] = sums[r][0];
    }
    Store<Simd>(call.out, first_row + r, sums[r]);
  }
}

template <typename Simd, int R, int V>
void GemmRest(const GemmCall& call, int first_row, int rest) {
  if constexpr (R > 0) {
    if (rest == R) {
      GemmTile<Simd, R, V>(call, first_row);
    } else {
      GemmRest<Simd, R - 1, V>(call, first_row, rest);
    }
  }
}

template <typename Simd, int V>
void GemmRows(const GemmCall& call) {
  int row = 0;
  for (; row + Simd::kRowTile <= call.row_count; row += Simd::kRowTile) {
    GemmTile<Simd, Simd::kRowTile, V>(call, row);
  }
  GemmRest<Simd, Simd::kRowTile - 1, V>(call, row, call.row_count - row);
}

template <typename Simd>
void Gemm(const GemmCall& call) {
  // A narrow panel (grouped convolutions, few outputs) needs one register only.
  if (call.out.outputs <= Simd::kLanes) {
    GemmRows<Simd, 1>(call);
  } else if (Simd::kVectors > 2 && call.out.outputs <= 2 * Simd::kLanes) {
    GemmRows<Simd, (Simd::kVectors > 2 ? 2 : 1)>(call);
  } else {
    GemmRows<Simd, Simd::kVectors>(call);
  }
}

// Decodes part `Part` and those above it of one step of codes, and adds their products.
template <typename Simd, int Bits, int Part, int R, int Chains>
inline void GemvParts(typename Simd::Sums (&sums)[R][Simd::kVectors][Chains],
                      const typename Simd::Codes (&codes)[Simd::kVectors], const typename Simd::Table& table,
                      const std::uint8_t* x, std::int64_t x_stride) {
  if constexpr (Part * Bits < 8) {
    typename Simd::Words weights[Simd::kVectors];
    for (int v = 0; v < Simd::kVectors; ++v) {
      weights[v] = Simd::template Decode<Bits, Part>(codes[v], table);
    }
    for (int r = 0; r < R; ++r) {
      const typename Simd::Words word = Simd::Spread(x + r * x_stride + Part * static_cast<int>(kWord));
      for (int v = 0; v < Simd::kVectors; ++v) {
        sums[r][v][Part % Chains] = Simd::Dot(sums[r][v][Part % Chains], word, weights[v]);
      }
    }
    GemvParts<Simd, Bits, Part + 1, R, Chains>(sums, codes, table, x, x_stride);
  }
}

// Asks for codes that are needed soon. One core reads as fast as its requests to memory are many; the processor's own
// prefetching stops at the ends of pages.
template <std::int64_t Size>
inline void FetchAhead(const std::uint8_t* packed) {
#if defined(__GNUC__)
  constexpr std::int64_t kAhead = 1024;
  constexpr std::int64_t kLine = 64;
  for (std::int64_t i = 0; i < Size; i += kLine) {
    __builtin_prefetch(packed + kAhead + i);
  }
#else
  static_cast<void>(packed);
#endif
}

template <typename Simd, int Bits, int R>
void GemvRows(const GemvCall& call) {
  // Two independent sums where registers allow hide the latency of the dot product.
  constexpr int kChains = R <= 2 ? 2 : 1;
  constexpr std::int64_t kStep = static_cast<std::int64_t>(PanelWidth<Simd>()) * Simd::kElements;
  typename Simd::Sums sums[R][Simd::kVectors][kChains];
  for (int v = 0; v < Simd::kVectors; ++v) {
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < kChains; ++c) {
        sums[r][v][c] = c == 0 ? Simd::LoadSums(call.out.start + v * Simd::kLanes) : Simd::Zero();
      }
    }
  }
  const typename Simd::Table table = Simd::LoadTable(call.levels);
  const std::uint8_t* packed = call.packed;
  const std::uint8_t* x = call.x;
  for (std::int64_t step = 0; step < call.steps; ++step) {
    typename Simd::Codes codes[Simd::kVectors];
    for (int v = 0; v < Simd::kVectors; ++v) {
      codes[v] = Simd::LoadCodes(packed + v * (kStep / Simd::kVectors));
    }
    FetchAhead<kStep>(packed);
    GemvParts<Simd, Bits, 0, R, kChains>(sums, codes, table, x, call.x_stride);
    packed += kStep;
    x += static_cast<std::int64_t>(kWord) * (8 / Bits);
  }
  for (int r = 0; r < R; ++r) {
    typename Simd::Sums total[Simd::kVectors];
    for (int v = 0; v < Simd::kVectors; ++v) {
      total[v] = sums[r][v][0];
      for (int c = 1; c < kChains; ++c) {
        total[v] = Simd::Add(total[v], sums[r][v][c]);
      }
    }
    Store<Simd>(call.out, r, total);
  }
}

template <typename Simd, int Bits>
void GemvBits(const GemvCall& call) {
  switch (call.row_count) {
    case 1:
      return GemvRows<Simd, Bits, 1>(call);
    case 2:
      return GemvRows<Simd, Bits, 2>(call);
    case 3:
      return GemvRows<Simd, Bits, 3>(call);
    default:
      return GemvRows<Simd, Bits, 4>(call);
  }
}

template <typename Simd>
void Gemv(const GemvCall& call) {
  if (call.bits == 4) {
    GemvBits<Simd, 4>(call);
  } else {
    GemvBits<Simd, 2>(call);
  }
}

// The table of a set whose functions are those of this file and of lut_body.h; gemv and depthwise are left to fill in.
template <typename Simd, typename Element>
constexpr KernelTable BasicTable(Isa isa, Activation activation) {
  KernelTable table = {};
  table.isa = isa;
  table.activation = activation;
  table.panel_width = PanelWidth<Simd>();
  table.row_tile = Simd::kRowTile;
  table.tight = false;
  table.panel_words = 1;
  table.direct_bytes = activation == Activation::kCentered ? 0 : static_cast<int>(kWord);
  table.gemm = Gemm<Simd>;
  table.layout = Layout<Element>;
  table.transpose = TransposeOut;
  table.convert = Convert<Element>;
  return table;
}

}  // namespace
}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_GEMM_H_
