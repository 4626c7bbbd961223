// The kernels of BorderQuantize: one text, compiled once per instruction set.
#ifndef POSTQUANT_CSRC_BORDER_BODY_H_
#define POSTQUANT_CSRC_BORDER_BODY_H_

#include <cstring>

#include "quantize_kernels.h"
#include "quantize_rounding.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace postquant::quantize {
namespace {

inline std::int32_t Below(float value) {
  const auto cut = static_cast<std::int32_t>(value);
  return cut - (value < static_cast<float>(cut) ? 1 : 0);
}

// floor(ratio), plus 1 if its fraction is above the border.
inline std::uint8_t Code(float ratio, std::int32_t below, float border, std::int32_t zero_point) {
  const float fraction = ratio - static_cast<float>(below);
  const float positive = border > 0.0F ? border : 0.0F;
  return static_cast<std::uint8_t>(below + zero_point + (fraction > positive ? 1 : 0));
}

// out[k] = table[index[k]], 0 <= index[k] < levels. Compilers find neither the permutation of a register, which a table
// of 16 is, nor, always, the gather.
constexpr std::size_t kGroup = 64;
constexpr std::int32_t kSmallTable = 16;

inline void LookUp(const std::int32_t (&index)[kGroup], const ChannelBorder& border, float (&out)[kGroup]) {
  float small[kSmallTable] = {};
  const bool is_small = border.levels <= kSmallTable;
  if (is_small) {
    std::memcpy(small, border.table, sizeof(float) * static_cast<std::size_t>(border.levels));
  }
#if defined(__AVX512F__)
  const __m512 all = _mm512_loadu_ps(small);
  for (std::size_t k = 0; k < kGroup; k += 16) {
    const __m512i which = _mm512_loadu_si512(index + k);
    _mm512_storeu_ps(out + k, is_small ? _mm512_permutexvar_ps(which, all)
                                       : _mm512_i32gather_ps(which, border.table, 4));
  }
#elif defined(__AVX2__)
  const __m256 low = _mm256_loadu_ps(small);
  const __m256 high = _mm256_loadu_ps(small + 8);
  for (std::size_t k = 0; k < kGroup; k += 8) {
    __m256i which;
    std::memcpy(&which, index + k, sizeof which);
    if (is_small) {
      const __m256 in_high = _mm256_castsi256_ps(_mm256_slli_epi32(which, 28));  // bit 3 of the index is the sign
      _mm256_storeu_ps(out + k, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, which),
                                                 _mm256_permutevar8x32_ps(high, which), in_high));
    } else {
      _mm256_storeu_ps(out + k, _mm256_i32gather_ps(border.table, which, 4));
    }
  }
#else
  const float* const table = is_small ? small : border.table;
  for (std::size_t k = 0; k < kGroup; ++k) {
    out[k] = table[index[k]];
  }
#endif
}

// Whole groups of elements with a border per level; returns how many elements that were.
std::size_t BorderGroups(const float* __restrict x, std::size_t count, float scale, const CodeRange& range,
                         const ChannelBorder& border, std::uint8_t* __restrict y) {
  const Limits limits(range);
  const std::int32_t zero_point = range.zero_point;
  const std::int32_t first = zero_point - range.low;
  std::size_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    float ratios[kGroup];
    std::int32_t index[kGroup];
    float limit[kGroup];
    for (std::size_t k = 0; k < kGroup; ++k) {
      ratios[k] = Limited(x[i + k] / scale, limits.low, limits.high);
      index[k] = Below(ratios[k]) + first;
    }
    LookUp(index, border, limit);
    for (std::size_t k = 0; k < kGroup; ++k) {
      y[i + k] = Code(ratios[k], index[k] - first, limit[k], zero_point);
    }
  }
  return i;
}

void Border(const float* __restrict x, std::size_t count, float scale, const CodeRange& range,
            const ChannelBorder& border, std::uint8_t* __restrict y) {
  const Limits limits(range);
  const std::int32_t zero_point = range.zero_point;
  const float* __restrict const table = border.table;
  if (border.levels == 1) {
    const float only = table[0];
    for (std::size_t i = 0; i < count; ++i) {
      const float ratio = Limited(x[i] / scale, limits.low, limits.high);
      y[i] = Code(ratio, Below(ratio), only, zero_point);
    }
    return;
  }
  const std::int32_t first = zero_point - range.low;
  for (std::size_t i = BorderGroups(x, count, scale, range, border, y); i < count; ++i) {
    const float ratio = Limited(x[i] / scale, limits.low, limits.high);
    const std::int32_t below = Below(ratio);
    y[i] = Code(ratio, below, table[below + first], zero_point);
  }
}

void Residual(const float* __restrict x, std::size_t count, float scale, const CodeRange& range,
              float* __restrict ratios, std::int16_t* __restrict residual) {
  const Limits limits(range);
  for (std::size_t i = 0; i < count; ++i) {
    const float ratio = Limited(x[i] / scale, limits.low, limits.high);
    const float nearest = (ratio + kRounder) - kRounder;
    ratios[i] = ratio;
    residual[i] = static_cast<std::int16_t>(Rounded((nearest - ratio) * 128.0F));
  }
}

inline void CopyGroups(const std::int16_t* __restrict from, std::size_t count, std::int16_t* __restrict to) {
  for (std::size_t i = 0; i < count; i += kPadding) {
    std::memcpy(to + i, from + i, kPadding * sizeof(std::int16_t));
  }
}

// A row is copied in whole groups; what that spoils of the next one is written again.
void SpreadRows(const std::int16_t* __restrict from, std::size_t width, std::size_t rows, std::size_t stride,
                std::int16_t* __restrict to) {
  for (std::size_t row = 0; row + 1 < rows; ++row) {
    std::int16_t* const begin = to + row * stride;
    CopyGroups(from + row * width, width, begin);
    for (std::size_t i = width; i < stride; ++i) {
      begin[i] = 0;
    }
  }
  std::memcpy(to + (rows - 1) * stride, from + (rows - 1) * width, width * sizeof(std::int16_t));
}

void GatherRows(const std::int16_t* __restrict from, std::size_t width, std::size_t rows, std::size_t stride,
                std::int16_t* __restrict to) {
  for (std::size_t row = 0; row < rows; ++row) {
    CopyGroups(from + row * stride, width, to + row * width);
  }
}

template <std::size_t kSize>
inline void WindowBlock(const std::int16_t* __restrict residual, std::size_t stride, const std::int8_t* weights,
                        std::size_t rows, std::size_t columns, std::int16_t* __restrict sums) {
  std::uint16_t block[kSize] = {};  // unsigned: sums wrap around on the way, never in the end
  for (std::size_t i = 0; i < rows; ++i) {
    for (std::size_t j = 0; j < columns; ++j) {
      const std::uint32_t weight = static_cast<std::uint32_t>(weights[i * columns + j]);
      const std::int16_t* const from = residual + i * stride + j;
      for (std::size_t k = 0; k < kSize; ++k) {
        block[k] = static_cast<std::uint16_t>(block[k] + weight * static_cast<std::uint32_t>(from[k]));
      }
    }
  }
  std::memcpy(sums, block, sizeof block);
}

void Window(const std::int16_t* __restrict residual, std::size_t stride, const std::int8_t* weights, std::size_t rows,
            std::size_t columns, std::size_t count, std::int16_t* __restrict sums) {
  std::size_t p = 0;
  for (; p + kBlock <= count; p += kBlock) {
    WindowBlock<kBlock>(residual + p, stride, weights, rows, columns, sums + p);
  }
  for (; p < count; p += kPadding) {
    WindowBlock<kPadding>(residual + p, stride, weights, rows, columns, sums + p);
  }
}

// kRanks sums at a time, so that a residual is converted once for all of them.
template <std::size_t kRanks>
inline void MixBlock(const std::int16_t* __restrict residual, std::size_t step, const std::int8_t* weights,
                     std::size_t channels, float* __restrict sums, std::size_t sums_step) {
  float block[kRanks][kPadding] = {};
  for (std::size_t c = 0; c < channels; ++c) {
    float values[kPadding];
    for (std::size_t k = 0; k < kPadding; ++k) {
      values[k] = static_cast<float>(residual[c * step + k]);
    }
    for (std::size_t r = 0; r < kRanks; ++r) {
      const float weight = static_cast<float>(weights[r * channels + c]);
      for (std::size_t k = 0; k < kPadding; ++k) {
        block[r][k] += weight * values[k];
      }
    }
  }
  for (std::size_t r = 0; r < kRanks; ++r) {
    std::memcpy(sums + r * sums_step, block[r], sizeof block[r]);
  }
}

void Mix(const std::int16_t* __restrict residual, std::size_t step, const std::int8_t* weights, std::size_t channels,
         std::size_t rank, std::size_t count, float* __restrict sums, std::size_t sums_step) {
  for (std::size_t p = 0; p < count; p += kPadding) {
    std::size_t r = 0;
    for (; r + 4 <= rank; r += 4) {
      MixBlock<4>(residual + p, step, weights + r * channels, channels, sums + r * sums_step + p, sums_step);
    }
    for (; r < rank; ++r) {
      MixBlock<1>(residual + p, step, weights + r * channels, channels, sums + r * sums_step + p, sums_step);
    }
  }
}

void Limit(std::size_t count, float scale, float* __restrict sums) {
  for (std::size_t i = 0; i < count; ++i) {
    sums[i] = static_cast<float>(Rounded(Limited(sums[i] * scale, -127.0F, 127.0F)));
  }
}

template <std::size_t kSize>
inline void CombineBlock(const float* __restrict inner, std::size_t stride, const std::int8_t* weights,
                         std::size_t rank, float* __restrict sums) {
  float block[kSize] = {};
  for (std::size_t r = 0; r < rank; ++r) {
    const float weight = static_cast<float>(weights[r]);
    const float* const from = inner + r * stride;
    for (std::size_t k = 0; k < kSize; ++k) {
      block[k] += weight * from[k];
    }
  }
  std::memcpy(sums, block, sizeof block);
}

void Combine(const float* __restrict inner, std::size_t stride, const std::int8_t* weights, std::size_t rank,
             std::size_t count, float* __restrict sums) {
  std::size_t p = 0;
  for (; p + kBlock <= count; p += kBlock) {
    CombineBlock<kBlock>(inner + p, stride, weights, rank, sums + p);
  }
  for (; p < count; p += kPadding) {
    CombineBlock<kPadding>(inner + p, stride, weights, rank, sums + p);
  }
}

template <bool kTable, bool kWindow, bool kAcross>
void DecideAs(const float* __restrict ratios, std::size_t count, const CodeRange& range, const ChannelBorder& border,
              const Neighbours& neighbours, std::uint8_t* __restrict y) {
  const std::int32_t zero_point = range.zero_point;
  const std::int32_t first = zero_point - range.low;
  const std::int16_t* __restrict const window = neighbours.window;
  const float* __restrict const across = neighbours.across;
  const float only = border.table[0];
  const float window_scale = border.window_scale;
  const float across_scale = border.across_scale;
  const auto decide = [=](std::size_t i, float ratio, std::int32_t below, float limit) {
    if (kWindow) {
      limit += static_cast<float>(window[i]) * window_scale;
    }
    if (kAcross) {
      limit += across[i] * across_scale;
    }
    return Code(ratio, below, limit, zero_point);
  };
  std::size_t i = 0;
  for (; kTable && i + kGroup <= count; i += kGroup) {
    std::int32_t index[kGroup];
    float limit[kGroup];
    for (std::size_t k = 0; k < kGroup; ++k) {
      index[k] = Below(ratios[i + k]) + first;
    }
    LookUp(index, border, limit);
    for (std::size_t k = 0; k < kGroup; ++k) {
      y[i + k] = decide(i + k, ratios[i + k], index[k] - first, limit[k]);
    }
  }
  for (; i < count; ++i) {
    const std::int32_t below = Below(ratios[i]);
    y[i] = decide(i, ratios[i], below, kTable ? border.table[below + first] : only);
  }
}

template <bool kTable>
void DecideWith(const float* __restrict ratios, std::size_t count, const CodeRange& range, const ChannelBorder& border,
                const Neighbours& neighbours, std::uint8_t* __restrict y) {
  if (neighbours.window != nullptr) {
    if (neighbours.across != nullptr) {
      DecideAs<kTable, true, true>(ratios, count, range, border, neighbours, y);
    } else {
      DecideAs<kTable, true, false>(ratios, count, range, border, neighbours, y);
    }
  } else if (neighbours.across != nullptr) {
    DecideAs<kTable, false, true>(ratios, count, range, border, neighbours, y);
  } else {
    DecideAs<kTable, false, false>(ratios, count, range, border, neighbours, y);
  }
}

void Decide(const float* __restrict ratios, std::size_t count, const CodeRange& range, const ChannelBorder& border,
            const Neighbours& neighbours, std::uint8_t* __restrict y) {
  if (border.levels == 1) {
    DecideWith<false>(ratios, count, range, border, neighbours, y);
  } else {
    DecideWith<true>(ratios, count, range, border, neighbours, y);
  }
}

}  // namespace
}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_BORDER_BODY_H_
