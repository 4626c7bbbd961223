// What needs no intrinsics: one text, compiled once per instruction set inside an anonymous namespace (a function with
// external linkage would let the linker keep one copy, of any set, for all).
#ifndef POSTQUANT_CSRC_LUT_BODY_H_
#define POSTQUANT_CSRC_LUT_BODY_H_

#include <cstdint>
#include <cstring>

#include "lut_table.h"

#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#define POSTQUANT_LUT_SSE2 1
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define POSTQUANT_LUT_NEON 1
#endif

namespace postquant::lut {
namespace {

// saturate(round_half_even(float(sum) * factor) + zero_point). Adding 1.5 * 2^23 rounds to an integer in the low bits,
// half to even; the product is limited to the range of the result first.
inline std::uint8_t RequantizeOne(std::int32_t sum, float factor, float low, float high, std::int32_t shift) {
  constexpr float kRounder = 12582912.0F;
  float value = static_cast<float>(sum) * factor;
  value = value < high ? value : high;
  value = value > low ? value : low;
  value += kRounder;
  std::int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<std::uint8_t>(bits + shift);
}

constexpr std::int32_t kRounderBits = 0x4B400000;

inline void RequantizeRow(const std::int32_t* sums, const float* factor, int count, const OutputNumbers& numbers,
                          std::uint8_t* y) {
  const float low = static_cast<float>(numbers.low - numbers.zero_point);
  const float high = static_cast<float>(numbers.high - numbers.zero_point);
  const std::int32_t shift = numbers.zero_point - kRounderBits;
  for (int i = 0; i < count; ++i) {
    y[i] = RequantizeOne(sums[i], factor[i], low, high, shift);
  }
}

// The float output of a row.
inline void ScaleRow(const std::int32_t* sums, const float* factor, const float* bias, int count, float* y) {
  for (int i = 0; i < count; ++i) {
    y[i] = static_cast<float>(sums[i]) * factor[i] + bias[i];
  }
}

inline void RequantizeChannel(const std::int32_t* sums, float factor, int count, const OutputNumbers& numbers,
                              std::uint8_t* y) {
  const float low = static_cast<float>(numbers.low - numbers.zero_point);
  const float high = static_cast<float>(numbers.high - numbers.zero_point);
  const std::int32_t shift = numbers.zero_point - kRounderBits;
  for (int i = 0; i < count; ++i) {
    y[i] = RequantizeOne(sums[i], factor, low, high, shift);
  }
}

// A block of 16 x 16 bytes, in place. Four perfect shuffles of its 256 bytes exchange rows and columns.
struct Block {
#if defined(POSTQUANT_LUT_SSE2)
  __m128i rows[16];
  void Load(int r, const std::uint8_t* p) { rows[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  void Store(int r, std::uint8_t* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rows[r]); }
  void Clear(int r) { rows[r] = _mm_setzero_si128(); }
  void Transpose() {
    for (int round = 0; round < 4; ++round) {
      __m128i next[16];
      for (int i = 0; i < 8; ++i) {
        next[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
        next[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
      }
      std::memcpy(rows, next, sizeof rows);
    }
  }
#elif defined(POSTQUANT_LUT_NEON)
  uint8x16_t rows[16];
  void Load(int r, const std::uint8_t* p) { rows[r] = vld1q_u8(p); }
  void Store(int r, std::uint8_t* p) const { vst1q_u8(p, rows[r]); }
  void Clear(int r) { rows[r] = vdupq_n_u8(0); }
  void Transpose() {
    for (int round = 0; round < 4; ++round) {
      uint8x16_t next[16];
      for (int i = 0; i < 8; ++i) {
        next[2 * i] = vzip1q_u8(rows[i], rows[i + 8]);
        next[2 * i + 1] = vzip2q_u8(rows[i], rows[i + 8]);
      }
      for (int i = 0; i < 16; ++i) {
        rows[i] = next[i];
      }
    }
  }
#else
  std::uint8_t rows[16][16];
  void Load(int r, const std::uint8_t* p) { std::memcpy(rows[r], p, 16); }
  void Store(int r, std::uint8_t* p) const { std::memcpy(p, rows[r], 16); }
  void Clear(int r) { std::memset(rows[r], 0, 16); }
  void Transpose() {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < i; ++j) {
        const std::uint8_t held = rows[i][j];
        rows[i][j] = rows[j][i];
        rows[j][i] = held;
      }
    }
  }
#endif
};

// `in` is a buffer whose rows and columns can be read up to the next multiple of 16.
inline void TransposeOut(const std::uint8_t* in, std::int64_t in_stride, int rows, int columns, std::uint8_t* out,
                         std::int64_t out_stride) {
  for (int c = 0; c < columns; c += 16) {
    const int width = columns - c < 16 ? columns - c : 16;
    for (int r = 0; r < rows; r += 16) {
      const int height = rows - r < 16 ? rows - r : 16;
      Block block;
      for (int i = 0; i < 16; ++i) {
        block.Load(i, in + (r + i) * in_stride + c);
      }
      block.Transpose();
      std::uint8_t* const to = out + c * out_stride + r;
      if (height == 16) {
        for (int i = 0; i < width; ++i) {
          block.Store(i, to + i * out_stride);
        }
      } else {
        for (int i = 0; i < width; ++i) {
          std::uint8_t bytes[16];
          block.Store(i, bytes);
          std::memcpy(to + i * out_stride, bytes, static_cast<std::size_t>(height));
        }
      }
    }
  }
}

// One activation as it is stored: a byte, or an int16 without its zero point.
inline void StoreOne(std::uint8_t code, std::int32_t, std::uint8_t* out) { *out = code; }
inline void StoreOne(std::uint8_t code, std::int32_t, std::int8_t* out) { *out = static_cast<std::int8_t>(code); }
inline void StoreOne(std::uint8_t code, std::int32_t zero_point, std::int16_t* out) {
  *out = static_cast<std::int16_t>(code - zero_point);
}

template <typename Element>
inline void ConvertBlock(const std::uint8_t* x, std::int32_t zero_point, std::uint8_t flip, Element* out) {
  Element block[16];
  for (int i = 0; i < 16; ++i) {
    StoreOne(static_cast<std::uint8_t>(x[i] ^ flip), zero_point, block + i);
  }
  std::memcpy(out, block, sizeof block);
}

// In blocks of 16; the last one overlaps the one before.
template <typename Element>
void ConvertRow(const std::uint8_t* x, std::int64_t count, std::int32_t zero_point, std::uint8_t flip, Element* out) {
  if (count < 16) {
    for (std::int64_t i = 0; i < count; ++i) {
      StoreOne(static_cast<std::uint8_t>(x[i] ^ flip), zero_point, out + i);
    }
    return;
  }
  for (std::int64_t i = 0; i + 16 <= count; i += 16) {
    ConvertBlock(x + i, zero_point, flip, out + i);
  }
  ConvertBlock(x + count - 16, zero_point, flip, out + count - 16);
}

template <typename Element>
void Convert(const std::uint8_t* x, std::int64_t count, std::int64_t padded, std::int32_t zero_point,
             std::uint8_t flip, std::uint8_t* out_bytes) {
  Element* const out = reinterpret_cast<Element*>(out_bytes);
  ConvertRow(x, count, zero_point, flip, out);
  std::memset(out + count, 0, static_cast<std::size_t>(padded - count) * sizeof(Element));
}

template <typename Element>
void FillPadding(std::int64_t count, std::int32_t zero_point, Element* out) {
  // In int16 the zero point is 0.
  std::memset(out, sizeof(Element) == 1 ? zero_point : 0, static_cast<std::size_t>(count) * sizeof(Element));
}

// A row of an image with 16 channels or more, in blocks; the last block of a row or column overlaps the one before.
template <typename Element>
void LayoutRowBlocks(const LayoutCall& call, const std::uint8_t* from, Element* to) {
  const std::int64_t width = call.size[1];
  const int span = static_cast<int>(width < 16 ? width : 16);
  for (std::int64_t w_next = 0; w_next < width; w_next += 16) {
    const std::int64_t w = w_next + 16 > width && width >= 16 ? width - 16 : w_next;
    for (std::int64_t c_next = 0; c_next < call.channels; c_next += 16) {
      const std::int64_t c = c_next + 16 > call.channels ? call.channels - 16 : c_next;
      Block block;
      for (int i = 0; i < 16; ++i) {
        const std::uint8_t* const source = from + (c + i) * call.channel_stride + w;
        if (call.x_end - source >= 16) {
          block.Load(i, source);
        } else {
          std::uint8_t bytes[16] = {};
          std::memcpy(bytes, source, static_cast<std::size_t>(span));
          block.Load(i, bytes);
        }
      }
      block.Transpose();
      for (int i = 0; i < span; ++i) {
        std::uint8_t bytes[16];
        block.Store(i, bytes);
        ConvertBlock(bytes, call.zero_point, call.flip, to + (w + i) * call.channels + c);
      }
    }
  }
}

template <typename Element>
void Layout(const LayoutCall& call) {
  const std::int64_t channels = call.channels;
  const std::int64_t row_elements = call.padded_width * channels;
  if (channels == 1) {
    FillPadding((call.row_end - call.row_begin) * row_elements, call.zero_point,
                reinterpret_cast<Element*>(call.out) + call.row_begin * row_elements);
  }
  for (std::int64_t row = call.row_begin; row < call.row_end; ++row) {
    Element* const out = reinterpret_cast<Element*>(call.out) + row * row_elements;
    const std::int64_t y = row - call.pad_begin[0];
    const bool inside_image = y >= 0 && y < call.size[0];
    if (channels == 1) {
      if (inside_image) {
        ConvertRow(call.x + y * call.size[1], call.size[1], call.zero_point, call.flip, out + call.pad_begin[1]);
      }
      continue;
    }
    if (!inside_image) {
      FillPadding(row_elements, call.zero_point, out);
      continue;
    }
    const std::int64_t left = call.pad_begin[1] * channels;
    const std::int64_t inside = call.size[1] * channels;
    FillPadding(left, call.zero_point, out);
    FillPadding(row_elements - left - inside, call.zero_point, out + left + inside);
    const std::uint8_t* const from = call.x + y * call.size[1];
    Element* const to = out + left;
    if (channels >= 16) {
      LayoutRowBlocks(call, from, to);
    } else {
      for (std::int64_t c = 0; c < channels; ++c) {
        const std::uint8_t* const channel = from + c * call.channel_stride;
        for (std::int64_t w = 0; w < call.size[1]; ++w) {
          StoreOne(static_cast<std::uint8_t>(channel[w] ^ call.flip), call.zero_point, to + w * channels + c);
        }
      }
    }
  }
}

}  // namespace
}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_BODY_H_
