// What BorderQuantize does across channels: one text, compiled once per instruction set. All sums are of integers that
// float32 holds as well.
#ifndef POSTQUANT_CSRC_BORDER_ACROSS_BODY_H_
#define POSTQUANT_CSRC_BORDER_ACROSS_BODY_H_

#include <type_traits>

#include "quantize_kernels.h"
#include "quantize_lanes.h"
#include "quantize_rounding.h"

namespace postquant::quantize {
namespace {

constexpr float kMostInner = 127.0F;

#if defined(POSTQUANT_LANES)
constexpr std::size_t kShorts = 2 * Lanes::kLanes;
constexpr std::size_t kCombined = 8 * Lanes::kLanes;  // points whose sums stay in registers

inline Lanes::Shorts Inner(Lanes::Ints low, Lanes::Ints high, float scale) {
  const Lanes::Floats factor = Lanes::Set(scale);
  const Lanes::Floats least = Lanes::Set(-kMostInner);
  const Lanes::Floats most = Lanes::Set(kMostInner);
  return Lanes::Pack(Lanes::Nearest(Lanes::Limited(Lanes::Multiply(Lanes::Real(low), factor), least, most)),
                     Lanes::Nearest(Lanes::Limited(Lanes::Multiply(Lanes::Real(high), factor), least, most)));
}

// Adds to kRanks sums at kShorts points, so that residuals are read once for all of them. Pairs of channels are
// interleaved within parts of a register; packing the sums puts the points back in order.
template <std::size_t kRanks>
inline void AddResiduals(const std::int16_t* residual, std::size_t step, const std::int16_t* weights,
                         std::size_t channels, Lanes::Ints (&low)[kRanks], Lanes::Ints (&high)[kRanks]) {
  const std::size_t even = Even(channels);
  for (std::size_t c = 0; c < channels; c += 2) {
    const Lanes::Shorts first = Lanes::LoadShorts(residual + c * step);
    const Lanes::Shorts second = c + 1 < channels ? Lanes::LoadShorts(residual + (c + 1) * step) : Lanes::NoShorts();
    const Lanes::Shorts low_pairs = Lanes::LowPairs(first, second);
    const Lanes::Shorts high_pairs = Lanes::HighPairs(first, second);
    for (std::size_t r = 0; r < kRanks; ++r) {
      const Lanes::Shorts weight = Lanes::SetPair(weights + r * even + c);
      low[r] = Lanes::AddProducts(low[r], low_pairs, weight);
      high[r] = Lanes::AddProducts(high[r], high_pairs, weight);
    }
  }
}

// Scales and rounds these sums.
template <std::size_t kRanks>
inline void StoreInner(const Lanes::Ints (&low)[kRanks], const Lanes::Ints (&high)[kRanks], const float* scale,
                       std::int16_t* inner, std::size_t inner_step) {
  for (std::size_t r = 0; r < kRanks; r += 2) {
    const Lanes::Shorts first = Inner(low[r], high[r], scale[r]);
    const std::size_t next = r + 1 < kRanks ? r + 1 : r;
    const Lanes::Shorts second = r + 1 < kRanks ? Inner(low[next], high[next], scale[next]) : Lanes::NoShorts();
    Lanes::StorePairs(first, second, inner + r / 2 * inner_step);
  }
}

// Calls group(r, number) for all ranks: as many of them at a time as there are registers for, and an even number but
// for the last one.
template <typename Group>
inline void InRanks(std::size_t rank, const Group& group) {
  std::size_t r = 0;
  for (; r + Lanes::kRanks <= rank; r += Lanes::kRanks) {
    group(r, std::integral_constant<std::size_t, Lanes::kRanks>());
  }
  for (; r + 2 <= rank; r += 2) {
    group(r, std::integral_constant<std::size_t, 2>());
  }
  if (r < rank) {
    group(r, std::integral_constant<std::size_t, 1>());
  }
}

void Mix(const std::int16_t* residual, std::size_t step, const std::int16_t* weights, std::size_t channels,
         const float* scale, std::size_t rank, std::size_t count, std::int16_t* inner, std::size_t inner_step) {
  const std::size_t even = Even(channels);
  for (std::size_t p = 0; p < count; p += kShorts) {
    InRanks(rank, [&](std::size_t r, auto ranks) {
      Lanes::Ints low[decltype(ranks)::value];
      Lanes::Ints high[decltype(ranks)::value];
      for (std::size_t i = 0; i < decltype(ranks)::value; ++i) {
        low[i] = high[i] = Lanes::NoShorts();
      }
      AddResiduals(residual + p, step, weights + r * even, channels, low, high);
      StoreInner(low, high, scale + r, inner + r / 2 * inner_step + 2 * p, inner_step);
    });
  }
}

template <std::size_t kSize>
inline void CombineBlock(const std::int16_t* inner, std::size_t inner_step, const std::int16_t* weights,
                         std::size_t rank, float* sums) {
  constexpr std::size_t kSums = kSize / Lanes::kLanes;
  Lanes::Ints block[kSums];
  const Lanes::Shorts first = Lanes::SetPair(weights);
  for (std::size_t s = 0; s < kSums; ++s) {
    block[s] = Lanes::AddProducts(Lanes::NoShorts(), Lanes::LoadShorts(inner + s * kShorts), first);
  }
  for (std::size_t r = 2; r < rank; r += 2) {
    const Lanes::Shorts weight = Lanes::SetPair(weights + r);
    const std::int16_t* const from = inner + r / 2 * inner_step;
    for (std::size_t s = 0; s < kSums; ++s) {
      block[s] = Lanes::AddProducts(block[s], Lanes::LoadShorts(from + s * kShorts), weight);
    }
  }
  for (std::size_t s = 0; s < kSums; ++s) {
    Lanes::Store(sums + s * Lanes::kLanes, Lanes::Real(block[s]));
  }
}

void Combine(const std::int16_t* inner, std::size_t inner_step, const std::int16_t* weights, std::size_t rank,
             std::size_t count, float* sums) {
  std::size_t p = 0;
  for (; p + kCombined <= count; p += kCombined) {
    CombineBlock<kCombined>(inner + 2 * p, inner_step, weights, rank, sums + p);
  }
  for (; p < count; p += kPadding) {
    CombineBlock<kPadding>(inner + 2 * p, inner_step, weights, rank, sums + p);
  }
}

#else

// One rank of a group of points.
inline void MixGroup(const std::int16_t* __restrict residual, std::size_t step, const std::int16_t* weights,
                     std::size_t channels, float scale, std::int16_t* __restrict inner) {
  float block[kPadding] = {};
  for (std::size_t c = 0; c < channels; ++c) {
    const float weight = static_cast<float>(weights[c]);
    for (std::size_t k = 0; k < kPadding; ++k) {
      block[k] += weight * static_cast<float>(residual[c * step + k]);
    }
  }
  for (std::size_t k = 0; k < kPadding; ++k) {
    inner[2 * k] = static_cast<std::int16_t>(Rounded(Limited(block[k] * scale, -kMostInner, kMostInner)));
  }
}

void Mix(const std::int16_t* residual, std::size_t step, const std::int16_t* weights, std::size_t channels,
         const float* scale, std::size_t rank, std::size_t count, std::int16_t* inner, std::size_t inner_step) {
  for (std::size_t p = 0; p < count; p += kPadding) {
    for (std::size_t r = 0; r < Even(rank); ++r) {
      std::int16_t* const to = inner + r / 2 * inner_step + 2 * p + r % 2;
      if (r < rank) {
        MixGroup(residual + p, step, weights + r * Even(channels), channels, scale[r], to);
      } else {
        for (std::size_t k = 0; k < kPadding; ++k) {
          to[2 * k] = 0;
        }
      }
    }
  }
}

void Combine(const std::int16_t* __restrict inner, std::size_t inner_step, const std::int16_t* weights,
             std::size_t rank, std::size_t count, float* __restrict sums) {
  for (std::size_t p = 0; p < count; p += kPadding) {
    float block[kPadding] = {};
    for (std::size_t r = 0; r < rank; r += 2) {
      const std::int16_t* const from = inner + r / 2 * inner_step + 2 * p;
      const std::int32_t first = weights[r];
      const std::int32_t second = weights[r + 1];
      for (std::size_t k = 0; k < kPadding; ++k) {
        block[k] += static_cast<float>(first * from[2 * k] + second * from[2 * k + 1]);
      }
    }
    for (std::size_t k = 0; k < kPadding; ++k) {
      sums[p + k] = block[k];
    }
  }
}

#endif

}  // namespace
}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_BORDER_ACROSS_BODY_H_
