// Depthwise convolution with 512-bit VNNI and VBMI, of kernels of three rows, straight from the tensor: a byte
// permutation brings the activations of 16 outputs next to each other and puts the zero point where there is no image.
// A narrow output fills a register with several of its rows.
#ifndef POSTQUANT_CSRC_LUT_DIRECT_VBMI_H_
#define POSTQUANT_CSRC_LUT_DIRECT_VBMI_H_

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lut_depthwise_avx512.h"
#include "lut_table.h"

namespace postquant::lut {
namespace {

constexpr int kDirectRows = 3;     // of the kernel
constexpr int kDirectColumns = 4;  // of the kernel, at most
constexpr int kMostBlocks = 16;    // of several rows
// Wider outputs with stride 1 read every row once: laying the plane out costs less than masks for every register.
constexpr std::int64_t kMostShared = 32;

// How 16 lanes are outputs: `rows` rows of `columns`.
struct LaneShape {
  std::int64_t rows;
  std::int64_t columns;

  std::int64_t Row(std::int64_t lane) const { return lane / columns; }
  std::int64_t Column(std::int64_t lane) const { return lane % columns; }

  // The most rows whose activations are within 64 bytes; no rows if not even one is.
  explicit LaneShape(const DirectCall& call) : rows(0), columns(std::min<std::int64_t>(call.out_size[1], 16)) {
    const std::int64_t most = call.out_size[1] <= 8 ? 16 / call.out_size[1] : 1;
    for (std::int64_t n = 1; n <= std::min(most, call.out_size[0]); ++n) {
      const std::int64_t reach = (n - 1) * call.stride[0] * call.in_size[1] + (columns - 1) * call.stride[1] +
                                 (kDirectColumns - 1) * call.dilation[1];
      if (reach < 64 && (n == 1 || (call.out_size[0] + n - 1) / n <= kMostBlocks)) {
        rows = n;
      }
    }
  }
};

// Bits of the lanes whose tap columns are in the image, for the outputs from column `x` on.
inline std::uint64_t ColumnMask(const DirectCall& call, const LaneShape& shape, std::int64_t x) {
  std::uint64_t mask = 0;
  for (std::int64_t lane = 0; lane < shape.rows * shape.columns; ++lane) {
    for (std::int64_t t = 0; t < kDirectColumns; ++t) {
      const std::int64_t at = (x + shape.Column(lane)) * call.stride[1] + t * call.dilation[1] - call.pad_begin[1];
      mask |= static_cast<std::uint64_t>(at >= 0 && at < call.in_size[1] ? 1 : 0) << (4 * lane + t);
    }
  }
  return mask;
}

class DirectReader {
 public:
  DirectReader(const DirectCall& call, const LaneShape& shape)
      : x_(call.x),
        size_(call.x_bytes),
        zero_(_mm512_set1_epi8(static_cast<char>(call.zero_point))),
        flip_(_mm512_set1_epi8(static_cast<char>(call.flip))) {
    std::uint8_t bytes[64];
    for (std::int64_t i = 0; i < 64; ++i) {
      const std::int64_t lane = i / 4;
      bytes[i] = static_cast<std::uint8_t>(shape.Row(lane) * call.stride[0] * call.in_size[1] +
                                           shape.Column(lane) * call.stride[1] + i % 4 * call.dilation[1]);
    }
    index_ = _mm512_loadu_si512(bytes);
  }

  // The words of 16 outputs whose first tap is byte `at` of the tensor, which may lie outside of it.
  __m512i operator()(std::int64_t at, std::uint64_t mask) const {
    const __m512i bytes = at >= 0 && at + 64 <= size_ ? _mm512_loadu_si512(x_ + at) : Some(at);
    return _mm512_mask_permutexvar_epi8(zero_, mask, index_, _mm512_xor_si512(bytes, flip_));
  }

 private:
  // At the ends of the tensor.
  __m512i Some(std::int64_t at) const {
    const std::int64_t begin = std::clamp<std::int64_t>(-at, 0, 64);
    const std::int64_t end = std::clamp<std::int64_t>(size_ - at, 0, 64);
    const std::uint64_t below_end = end == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << end) - 1;
    const std::uint64_t from_begin = begin == 64 ? 0 : ~std::uint64_t{0} << begin;
    return _mm512_maskz_loadu_epi8(below_end & from_begin, x_ + at);
  }

  const std::uint8_t* x_;
  std::int64_t size_;
  __m512i zero_;
  __m512i flip_;
  __m512i index_;
};

// What is the same for all outputs of channel plane `plane`.
struct DirectChannel {
  Channel channel;
  __m512i taps[kDirectRows];
  std::int64_t corner;  // byte of the tensor under the first tap of the first output
  std::uint8_t* y;

  DirectChannel(const DirectCall& call, std::int64_t plane)
      : channel(OneChannel(call, plane % call.channels)),
        corner((plane * call.in_size[0] - call.pad_begin[0]) * call.in_size[1] - call.pad_begin[1]),
        y(call.y + plane * call.out_size[0] * call.out_size[1]) {
    for (int ky = 0; ky < kDirectRows; ++ky) {
      taps[ky] = Taps(call.taps + (plane % call.channels * kDirectRows + ky) * kDirectColumns);
    }
  }

  static Channel OneChannel(const DirectCall& call, std::int64_t index) {
    DepthwiseCall one = {};
    one.start = call.start[index];
    one.factor = call.factor[index];
    one.numbers = call.numbers;
    return Channel(one);
  }
};

inline bool HasRow(const DirectCall& call, std::int64_t y) { return y >= 0 && y < call.in_size[0]; }

// Registers of several rows.
inline void DirectBlocks(const DirectCall& call, const LaneShape& shape) {
  const DirectReader read(call, shape);
  const std::uint64_t columns = ColumnMask(call, shape, 0);
  const auto blocks = static_cast<int>((call.out_size[0] + shape.rows - 1) / shape.rows);
  std::uint64_t masks[kMostBlocks][kDirectRows] = {};
  for (int block = 0; block < blocks; ++block) {
    for (int ky = 0; ky < kDirectRows; ++ky) {
      for (std::int64_t lane = 0; lane < shape.rows * shape.columns; ++lane) {
        const std::int64_t y = (block * shape.rows + shape.Row(lane)) * call.stride[0] + ky - call.pad_begin[0];
        masks[block][ky] |= HasRow(call, y) ? columns & (std::uint64_t{15} << (4 * lane)) : 0;
      }
    }
  }
  for (std::int64_t plane = call.first; plane < call.first + call.count; ++plane) {
    const DirectChannel c(call, plane);
    for (int block = 0; block < blocks; ++block) {
      const std::int64_t y = block * shape.rows;
      __m512i sums = c.channel.start;
      for (int ky = 0; ky < kDirectRows; ++ky) {
        const std::int64_t at = c.corner + (y * call.stride[0] + ky) * call.in_size[1];
        sums = _mm512_dpbusd_epi32(sums, read(at, masks[block][ky]), c.taps[ky]);
      }
      const std::int64_t outputs = std::min(shape.rows, call.out_size[0] - y) * call.out_size[1];
      c.channel.Store(sums, Columns(outputs), c.y + y * call.out_size[1]);
    }
  }
}

// Registers of one row. With stride 1 the rows that two outputs share are read once.
template <bool Shared>
void DirectStrips(const DirectCall& call, const LaneShape& shape) {
  const DirectReader read(call, shape);
  for (std::int64_t x = 0; x < call.out_size[1]; x += 16) {
    const std::uint64_t mask = ColumnMask(call, shape, x);
    for (std::int64_t plane = call.first; plane < call.first + call.count; ++plane) {
      const DirectChannel c(call, plane);
      std::int64_t at = c.corner + x * call.stride[1];
      std::int64_t row = -call.pad_begin[0];
      __m512i rows[kDirectRows] = {};
      if constexpr (Shared) {
        for (int ky = 1; ky < kDirectRows; ++ky) {
          rows[ky] = read(at + (ky - 1) * call.in_size[1], HasRow(call, row + ky - 1) ? mask : 0);
        }
      }
      const __mmask16 some = Columns(call.out_size[1] - x);
      std::uint8_t* to = c.y + x;
      for (std::int64_t y = 0; y < call.out_size[0]; ++y) {
        for (int ky = 0; ky < kDirectRows; ++ky) {
          if (Shared && ky + 1 < kDirectRows) {
            rows[ky] = rows[ky + 1 < kDirectRows ? ky + 1 : ky];
          } else {
            rows[ky] = read(at + ky * call.in_size[1], HasRow(call, row + ky) ? mask : 0);
          }
        }
        __m512i sums = c.channel.start;
        for (int ky = 0; ky < kDirectRows; ++ky) {
          sums = _mm512_dpbusd_epi32(sums, rows[ky], c.taps[ky]);
        }
        c.channel.Store(sums, some, to);
        to += call.out_size[1];
        at += call.stride[0] * call.in_size[1];
        row += call.stride[0];
      }
    }
  }
}

inline bool DirectVbmi(const DirectCall& call) {
  if (call.kernel[0] != kDirectRows || call.kernel[1] > kDirectColumns || call.dilation[0] != 1 ||
      (call.stride[0] == 1 && call.out_size[1] > kMostShared)) {
    return false;
  }
  const LaneShape shape(call);
  if (shape.rows == 0) {
    return false;
  }
  if (shape.rows > 1) {
    DirectBlocks(call, shape);
  } else if (call.stride[0] == 1) {
    DirectStrips<true>(call, shape);
  } else {
    DirectStrips<false>(call, shape);
  }
  return true;
}

}  // namespace
}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_DIRECT_VBMI_H_
