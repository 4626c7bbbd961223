// The kernel of FeedbackRequantize: one text, compiled once per instruction set. Rows are kTilePositions long, and what
// they hold beyond the positions of a tile is computed with them and then forgotten.
#ifndef POSTQUANT_CSRC_FEEDBACK_BODY_H_
#define POSTQUANT_CSRC_FEEDBACK_BODY_H_

#include <cstring>
#include <type_traits>

#include "adaptive_body.h"
#include "border_across_body.h"
#include "feedback_cells_body.h"
#include "levels_body.h"
#include "quantize_kernels.h"
#include "quantize_lanes.h"
#include "quantize_rounding.h"

namespace postquant::quantize {
namespace {

constexpr float kMostShift = 255.0F;
constexpr std::int16_t kMostError = 127;

// -- sums across channels, which are exact in any order ----------------------------------------------------------

#if defined(POSTQUANT_LANES)
constexpr std::size_t kTogether = Lanes::kRanks / 2;  // channels whose sums of kRegisters fit in all registers
static_assert(kTilePositions % kGroup == 0, "tiles are whole groups of registers");

// Adds what a group's errors make to all sums (`first`: to 0), and rounds them. Sums stay in the order of registers.
void AddErrors(const std::int16_t* errors, const std::int16_t* left, std::size_t channels, const float* scale,
               std::size_t rank, bool first, std::int32_t* sums, std::int16_t* inner) {
  const std::size_t even = Even(channels);
  for (std::size_t p = 0; p < kTilePositions; p += kShorts) {
    InRanks(rank, [&](std::size_t r, auto ranks) {
      constexpr std::size_t kCount = decltype(ranks)::value;
      std::int32_t* const stored = sums + p * rank + r * kShorts;
      Lanes::Ints low[kCount];
      Lanes::Ints high[kCount];
      for (std::size_t i = 0; i < kCount; ++i) {
        low[i] = first ? Lanes::NoShorts() : Lanes::LoadInts(stored + i * kShorts);
        high[i] = first ? Lanes::NoShorts() : Lanes::LoadInts(stored + i * kShorts + Lanes::kLanes);
      }
      AddResiduals(errors + p, kTilePositions, left + r * even, channels, low, high);
      for (std::size_t i = 0; i < kCount; ++i) {
        Lanes::StoreInts(stored + i * kShorts, low[i]);
        Lanes::StoreInts(stored + i * kShorts + Lanes::kLanes, high[i]);
      }
      StoreInner(low, high, scale + r, inner + r * kTilePositions + 2 * p, 2 * kTilePositions);
    });
  }
}

// What rounded sums make of the shifts of some channels: take(c, p, shifts) for kGroup positions from p on.
template <std::size_t kChannels, typename Take>
inline void ShiftBlock(const std::int16_t* inner, const std::int16_t* right, std::size_t rank, const float* scale,
                       const Take& take) {
  const std::size_t even = Even(rank);
  const Lanes::Floats least = Lanes::Set(-kMostShift);
  const Lanes::Floats most = Lanes::Set(kMostShift);
  for (std::size_t p = 0; p < kTilePositions; p += kGroup) {
    Lanes::Ints sums[kChannels][kRegisters];
    for (std::size_t c = 0; c < kChannels; ++c) {
      for (std::size_t s = 0; s < kRegisters; ++s) {
        sums[c][s] = Lanes::NoShorts();
      }
    }
    for (std::size_t r = 0; r < rank; r += 2) {
      Lanes::Shorts pairs[kRegisters];
      for (std::size_t s = 0; s < kRegisters; ++s) {
        pairs[s] = Lanes::LoadShorts(inner + r * kTilePositions + 2 * p + s * kShorts);
      }
      for (std::size_t c = 0; c < kChannels; ++c) {
        const Lanes::Shorts weight = Lanes::SetPair(right + c * even + r);
        for (std::size_t s = 0; s < kRegisters; ++s) {
          sums[c][s] = Lanes::AddProducts(sums[c][s], pairs[s], weight);
        }
      }
    }
    for (std::size_t c = 0; c < kChannels; ++c) {
      const Lanes::Floats factor = Lanes::Set(scale[c]);
      for (std::size_t s = 0; s < kRegisters; ++s) {
        sums[c][s] = Lanes::Nearest(Lanes::Limited(Lanes::Multiply(Lanes::Real(sums[c][s]), factor), least, most));
      }
      take(c, p, sums[c]);
    }
  }
}

// Codes of some channels, [kChannels][kTilePositions], minus their shifts.
template <std::size_t kChannels>
inline void AimBlock(const std::int16_t* inner, const std::int16_t* right, std::size_t rank, const float* scale,
                     const std::uint8_t* codes, std::uint8_t* aims) {
  ShiftBlock<kChannels>(inner, right, rank, scale, [&](std::size_t c, std::size_t p, Lanes::Ints(&block)[kRegisters]) {
    const std::uint8_t* const from = codes + c * kTilePositions + p;
    for (std::size_t s = 0; s < kRegisters; ++s) {
      block[s] = Lanes::SubtractInts(Lanes::LoadBytes(from + s * Lanes::kLanes), block[s]);
    }
    Lanes::StoreBytes(block, 0, aims + c * kTilePositions + p);
  });
}

// The shifts themselves, [kChannels][kTilePositions].
template <std::size_t kChannels>
inline void StoreShifts(const std::int16_t* inner, const std::int16_t* right, std::size_t rank, const float* scale,
                        std::int32_t* shifts) {
  ShiftBlock<kChannels>(inner, right, rank, scale, [&](std::size_t c, std::size_t p, Lanes::Ints(&block)[kRegisters]) {
    for (std::size_t s = 0; s < kRegisters; ++s) {
      Lanes::StoreInts(shifts + c * kTilePositions + p + s * Lanes::kLanes, block[s]);
    }
  });
}

inline void MultipliedCodes(const FeedbackPlan& plan, const std::uint8_t* x, std::uint8_t* codes) {
  const Limits limits(plan.range);
  const Lanes::Ints middle = Lanes::SetInt(plan.x_zero_point);
  const Lanes::Floats x_scale = Lanes::Set(plan.x_scale);
  const Lanes::Floats reciprocal = Lanes::Set(plan.reciprocal);
  const Lanes::Floats low = Lanes::Set(limits.low);
  const Lanes::Floats high = Lanes::Set(limits.high);
  for (std::size_t p = 0; p < kTilePositions; p += kGroup) {
    Lanes::Ints block[kRegisters];
    for (std::size_t s = 0; s < kRegisters; ++s) {
      const Lanes::Ints centered = Lanes::SubtractInts(Lanes::LoadBytes(x + p + s * Lanes::kLanes), middle);
      const Lanes::Floats real = Lanes::Multiply(Lanes::Real(centered), x_scale);
      block[s] = Lanes::Nearest(Lanes::Limited(Lanes::Multiply(real, reciprocal), low, high));
    }
    Lanes::StoreBytes(block, plan.range.zero_point, codes + p);
  }
}

inline void Errors(const std::uint8_t* levels, const std::uint8_t* codes, std::int16_t* errors) {
  for (std::size_t p = 0; p < kTilePositions; p += kShorts) {
    Lanes::StoreShorts(errors + p, Lanes::Difference(levels + p, codes + p, kMostError));
  }
}

#else
constexpr std::size_t kTogether = 1;

void AddErrors(const std::int16_t* __restrict errors, const std::int16_t* __restrict left, std::size_t channels,
               const float* scale, std::size_t rank, bool first, std::int32_t* __restrict sums,
               std::int16_t* __restrict inner) {
  for (std::size_t r = 0; r < rank; ++r) {
    std::int32_t* const row = sums + r * kTilePositions;
    const std::int16_t* const weights = left + r * Even(channels);
    for (std::size_t p = 0; p < kTilePositions; p += kPadding) {
      std::int32_t block[kPadding];
      for (std::size_t k = 0; k < kPadding; ++k) {
        block[k] = first ? 0 : row[p + k];
      }
      for (std::size_t c = 0; c < channels; ++c) {
        for (std::size_t k = 0; k < kPadding; ++k) {
          block[k] += std::int32_t{weights[c]} * errors[c * kTilePositions + p + k];
        }
      }
      for (std::size_t k = 0; k < kPadding; ++k) {
        row[p + k] = block[k];
        const float scaled = static_cast<float>(block[k]) * scale[r];
        inner[r * kTilePositions + p + k] =
            static_cast<std::int16_t>(Rounded(Limited(scaled, -kMostInner, kMostInner)));
      }
    }
  }
}

template <std::size_t kChannels>
inline void StoreShifts(const std::int16_t* __restrict inner, const std::int16_t* __restrict right, std::size_t rank,
                        const float* scale, std::int32_t* __restrict shifts) {
  for (std::size_t c = 0; c < kChannels; ++c) {
    for (std::size_t p = 0; p < kTilePositions; p += kPadding) {
      std::int32_t block[kPadding] = {};
      for (std::size_t r = 0; r < rank; ++r) {
        for (std::size_t k = 0; k < kPadding; ++k) {
          block[k] += std::int32_t{right[c * Even(rank) + r]} * inner[r * kTilePositions + p + k];
        }
      }
      for (std::size_t k = 0; k < kPadding; ++k) {
        const float shift = Limited(static_cast<float>(block[k]) * scale[c], -kMostShift, kMostShift);
        shifts[c * kTilePositions + p + k] = Rounded(shift);
      }
    }
  }
}

template <std::size_t kChannels>
inline void AimBlock(const std::int16_t* inner, const std::int16_t* right, std::size_t rank, const float* scale,
                     const std::uint8_t* __restrict codes, std::uint8_t* __restrict aims) {
  std::int32_t shifts[kChannels * kTilePositions];
  StoreShifts<kChannels>(inner, right, rank, scale, shifts);
  for (std::size_t i = 0; i < kChannels * kTilePositions; ++i) {
    const std::int32_t aim = std::int32_t{codes[i]} - shifts[i];
    aims[i] = static_cast<std::uint8_t>(aim < 0 ? 0 : aim > 255 ? 255 : aim);
  }
}

inline void MultipliedCodes(const FeedbackPlan& plan, const std::uint8_t* __restrict x,
                            std::uint8_t* __restrict codes) {
  const Limits limits(plan.range);
  for (std::size_t i = 0; i < kTilePositions; ++i) {
    const float real = static_cast<float>(std::int32_t{x[i]} - plan.x_zero_point) * plan.x_scale;
    codes[i] = Multiplied(real, plan.reciprocal, limits, plan.range.zero_point);
  }
}

inline void Errors(const std::uint8_t* __restrict levels, const std::uint8_t* __restrict codes,
                   std::int16_t* __restrict errors) {
  for (std::size_t i = 0; i < kTilePositions; ++i) {
    const std::int32_t error = std::int32_t{levels[i]} - codes[i];
    errors[i] = static_cast<std::int16_t>(error < -kMostError ? -kMostError : error > kMostError ? kMostError : error);
  }
}
#endif

// Codes of x to codes on the levels' grid.
inline void LevelCodes(const FeedbackPlan& plan, const std::uint8_t* x, std::uint8_t* codes) {
  if (plan.same_codes) {
    std::memcpy(codes, x, kTilePositions);
  } else if (plan.reciprocal != 0.0F) {
    MultipliedCodes(plan, x, codes);
  } else {
    for (std::size_t i = 0; i < kTilePositions; ++i) {
      codes[i] = plan.codes[x[i]];
    }
  }
}

// -- rows of a tile ----------------------------------------------------------------------------------------------

// Exchanges the high one of two parts of `kBits` wherever `kLow` has the low one for that of `b`.
template <unsigned kBits, std::uint64_t kLow>
inline void Exchange(std::uint64_t& a, std::uint64_t& b) {
  const std::uint64_t changed = ((a >> kBits) ^ b) & kLow;
  b ^= changed;
  a ^= changed << kBits;
}

// 8 by 8 bytes turned, in words whose first byte is the lowest.
inline void TurnSquare(const std::uint8_t* from, std::size_t from_step, std::uint8_t* to, std::size_t to_step) {
  std::uint64_t words[8];
  for (std::size_t i = 0; i < 8; ++i) {
    std::memcpy(words + i, from + i * from_step, 8);
  }
  for (std::size_t i = 0; i < 4; ++i) {
    Exchange<32, 0x00000000FFFFFFFFU>(words[i], words[i + 4]);
  }
  for (std::size_t i = 0; i < 8; i += 4) {
    Exchange<16, 0x0000FFFF0000FFFFU>(words[i], words[i + 2]);
    Exchange<16, 0x0000FFFF0000FFFFU>(words[i + 1], words[i + 3]);
  }
  for (std::size_t i = 0; i < 8; i += 2) {
    Exchange<8, 0x00FF00FF00FF00FFU>(words[i], words[i + 1]);
  }
  for (std::size_t i = 0; i < 8; ++i) {
    std::memcpy(to + i * to_step, words + i, 8);
  }
}

// to[j][i] = from[i][j] for i < rows, j < columns.
void Turn(const std::uint8_t* from, std::size_t from_step, std::size_t rows, std::size_t columns, std::uint8_t* to,
          std::size_t to_step) {
  for (std::size_t i = 0; i < rows; i += 8) {
    for (std::size_t j = 0; j < columns; j += 8) {
      const std::uint8_t* const part = from + i * from_step + j;
      std::uint8_t* const turned = to + j * to_step + i;
      if (i + 8 <= rows && j + 8 <= columns) {
        TurnSquare(part, from_step, turned, to_step);
        continue;
      }
      for (std::size_t k = 0; k < 8 && i + k < rows; ++k) {
        for (std::size_t l = 0; l < 8 && j + l < columns; ++l) {
          turned[l * to_step + k] = part[k * from_step + l];
        }
      }
    }
  }
}

// The row of a channel, whose positions are in several places; and back.
inline void GatherRow(const FeedbackTile& tile, const std::uint8_t* x, std::uint8_t* row) {
  for (std::size_t i = 0; i < tile.runs; row += tile.run[i].count, ++i) {
    std::memcpy(row, x + tile.run[i].first, tile.run[i].count);
  }
}

inline void ScatterRow(const FeedbackTile& tile, const std::uint8_t* row, std::uint8_t* y) {
  for (std::size_t i = 0; i < tile.runs; row += tile.run[i].count, ++i) {
    std::memcpy(y + tile.run[i].first, row, tile.run[i].count);
  }
}

// -- a tile ------------------------------------------------------------------------------------------------------

// Aims of `count` channels from the `i`th on, kTogether at most, in the order of the plan.
inline void Aims(const FeedbackPlan& plan, const std::int16_t* inner, std::size_t i, std::size_t count,
                 const std::uint8_t* codes, std::uint8_t* aims) {
  const std::size_t even = Even(plan.rank);
  if (count == kTogether) {
    AimBlock<kTogether>(inner, plan.right + i * even, plan.rank, plan.right_scale + i, codes, aims);
    return;
  }
  for (std::size_t k = 0; k < count; ++k) {
    AimBlock<1>(inner, plan.right + (i + k) * even, plan.rank, plan.right_scale + i + k, codes + k * kTilePositions,
                aims + k * kTilePositions);
  }
}

void Feedback(const FeedbackPlan& plan, const FeedbackTile& tile, const FeedbackScratch& scratch,
              const std::uint8_t* x, std::uint8_t* y) {
  const bool cells = plan.cell > 1;
  const bool turned = !cells && tile.channel_step == 1;
  const bool kept = cells || turned;  // all rows are made at first, and brought back at last
  const bool whole = tile.runs == 1 && tile.run[0].count == kTilePositions && !kept;
  const std::size_t place_channels = cells ? plan.channels / (plan.cell * plan.cell) : plan.channels;
  std::uint8_t row[kTilePositions] = {};
  std::uint8_t codes[kTogether * kTilePositions];
  std::uint8_t aims[kTogether * kTilePositions];
  if (turned) {
    Turn(x + tile.run[0].first, plan.channels, tile.runs, plan.channels, scratch.rows, kTilePositions);
  } else if (cells) {
    GatherCells(plan, tile, x, scratch.rows);
  }
  const std::int16_t* left = plan.left;
  std::size_t begin = 0;
  for (std::size_t group = 0; group < plan.groups; ++group) {
    const std::size_t end = plan.ends[group];
    const bool last = group + 1 == plan.groups;
    for (std::size_t i = begin; i < end; i += kTogether) {
      const std::size_t count = end - i < kTogether ? end - i : kTogether;
      for (std::size_t k = 0; k < count; ++k) {
        const std::size_t channel = plan.order[i + k];
        const std::uint8_t* from = kept ? scratch.rows + channel * kTilePositions : row;
        if (whole) {
          from = x + tile.run[0].first + channel * tile.channel_step;
        } else if (!kept) {
          GatherRow(tile, x + channel * tile.channel_step, row);
        }
        LevelCodes(plan, from, codes + k * kTilePositions);
      }
      if (group > 0) {
        Aims(plan, scratch.inner, i, count, codes, aims);
      }
      for (std::size_t k = 0; k < count; ++k) {
        const std::size_t channel = plan.order[i + k];
        const std::size_t map = (cells ? channel % place_channels : channel) * plan.map_step;
        std::uint8_t* to = kept ? scratch.rows + channel * kTilePositions : row;
        if (whole) {
          to = y + tile.run[0].first + channel * tile.channel_step;
        }
        Levels((group > 0 ? aims : codes) + k * kTilePositions, kTilePositions, plan.maps[map], to);
        if (!last) {
          std::int16_t* const errors = scratch.errors + (i + k - begin) * kTilePositions;
          Errors(to, codes + k * kTilePositions, errors);
          if (!tile.whole_cells) {
            ClearBeyond(tile, channel / place_channels / plan.cell, channel / place_channels % plan.cell, errors);
          }
        }
        if (!whole && !kept) {
          ScatterRow(tile, row, y + channel * tile.channel_step);
        }
      }
    }
    if (!last) {
      AddErrors(scratch.errors, left, end - begin, plan.left_scale, plan.rank, group == 0, scratch.sums,
                scratch.inner);
      left += plan.rank * Even(end - begin);
    }
    begin = end;
  }
  if (turned) {
    Turn(scratch.rows, kTilePositions, plan.channels, tile.runs, y + tile.run[0].first, plan.channels);
  } else if (cells) {
    ScatterCells(plan, tile, scratch.rows, y);
  }
}

}  // namespace
}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_FEEDBACK_BODY_H_
