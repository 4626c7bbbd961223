// The kernels of simulate_kernels.h: one text, compiled once per instruction set. Compilers vectorise these loops.
#ifndef POSTQUANT_CSRC_SIMULATE_BODY_H_
#define POSTQUANT_CSRC_SIMULATE_BODY_H_

#include <limits>

#include "feedback_body.h"
#include "quantize_kernels.h"
#include "quantize_rounding.h"
#include "simulate_kernels.h"

namespace postquant::quantize {
namespace {

// -- levels ------------------------------------------------------------------------------------------------------

// As torch.lerp with a weight of 0 or 1.
inline float Mixed(float value, float level, float weight) {
  const bool small = Magnitude(weight) < 0.5F;
  const float share = small ? weight : weight - 1.0F;
  return (small ? value : level) + share * (level - value);
}

// The place of an element's code as float32.
inline float Place(float value, float low, float per_unit) {
  const float place = (value - low) * per_unit + 1.0F;
  return (Limited(place, 0.0F, kLastPlace) + kRounder) - kRounder;
}

// With what lies outside of a channel's levels at the ends.
inline std::int16_t Ended(float place, float bottom, float top) {
  const float below = place > top ? kLastPlace : place;
  const float ended = below < bottom ? 0.0F : below;
  return static_cast<std::int16_t>(static_cast<std::int32_t>(ended));
}

template <std::size_t kSteps, bool kMasked, bool kShifted>
void RowOfSteps(const SimulatedValues& values, std::size_t count, const SimulatedLevels& levels, std::size_t channel) {
  const float* __restrict const x = values.x;
  const float* __restrict const mask = values.mask;
  const std::int16_t* __restrict const shift = values.shift;
  float* __restrict const y = values.y;
  std::int16_t* __restrict const places = values.places;
  const float step = values.step;
  const float low = levels.low;
  const float per_unit = levels.per_unit;
  const float bottom = levels.bottom[channel];
  const float top = levels.top[channel];
  float first[kSteps];
  float level[kSteps + 1];
  level[0] = levels.level[channel * levels.channel_step];
  for (std::size_t s = 0; s < kSteps; ++s) {
    first[s] = levels.first[channel * levels.channel_step + s * levels.level_step];
    level[s + 1] = levels.level[channel * levels.channel_step + (s + 1) * levels.level_step];
  }
  for (std::size_t i = 0; i < count; ++i) {
    const float value = kShifted ? x[i] - static_cast<float>(shift[i]) * step : x[i];
    const float place = Place(value, low, per_unit);
    float nearest = level[0];
    for (std::size_t s = 0; s < kSteps; ++s) {
      nearest = place >= first[s] ? level[s + 1] : nearest;
    }
    y[i] = kMasked ? Mixed(value, nearest, mask[i]) : nearest;
    places[i] = Ended(place, bottom, top);
  }
}

template <std::size_t kSteps, bool kMasked, bool kShifted>
inline void AcrossBlockOfSteps(const float* __restrict x, const float* __restrict mask,
                               const std::int16_t* __restrict shift, float step, float low, float per_unit,
                               const float* __restrict bottom, const float* __restrict top,
                               const float* __restrict first, const float* __restrict level, std::size_t level_step,
                               std::size_t count, float* __restrict y, std::int16_t* __restrict places) {
  for (std::size_t i = 0; i < count; ++i) {
    const float value = kShifted ? x[i] - static_cast<float>(shift[i]) * step : x[i];
    const float place = Place(value, low, per_unit);
    float nearest = level[i];
    for (std::size_t s = 0; s < kSteps; ++s) {
      const float higher = level[(s + 1) * level_step + i];
      nearest = place >= first[s * level_step + i] ? higher : nearest;
    }
    y[i] = kMasked ? Mixed(value, nearest, mask[i]) : nearest;
    places[i] = Ended(place, bottom[i], top[i]);
  }
}

// Channels some at a time, so that their levels stay in the first cache.
template <std::size_t kSteps, bool kMasked, bool kShifted>
void AcrossOfLevels(const SimulatedValues& values, std::size_t count, const SimulatedLevels& levels, std::size_t) {
  constexpr std::size_t kAtOnce = 64;
  const std::size_t channels = levels.channels;
  for (std::size_t c = 0; c < channels; c += kAtOnce) {
    const std::size_t some = channels - c < kAtOnce ? channels - c : kAtOnce;
    for (std::size_t row = 0; row < count; ++row) {
      const std::size_t i = row * channels + c;
      const float* const mask = kMasked ? values.mask + i : nullptr;
      const std::int16_t* const shift = kShifted ? values.shift + i : nullptr;
      AcrossBlockOfSteps<kSteps, kMasked, kShifted>(values.x + i, mask, shift, values.step, levels.low,
                                                    levels.per_unit, levels.bottom + c, levels.top + c, levels.first + c,
                                                    levels.level + c, levels.level_step, some, values.y + i,
                                                    values.places + i);
    }
  }
}

using SimulateLoop = void (*)(const SimulatedValues&, std::size_t, const SimulatedLevels&, std::size_t);

// The loop for what there is: rows[masked][shifted] of so many steps.
struct SimulateLoops {
  SimulateLoop rows[2][2];
};

inline void RunLoop(const SimulateLoops (&loops)[3], const SimulatedValues& values, std::size_t count,
                    const SimulatedLevels& levels, std::size_t channel) {
  const std::size_t size = levels.steps <= 3 ? 0 : levels.steps <= 7 ? 1 : 2;
  loops[size].rows[values.mask != nullptr][values.shift != nullptr](values, count, levels, channel);
}

void SimulateRow(const SimulatedValues& values, std::size_t count, const SimulatedLevels& levels,
                 std::size_t channel) {
  static constexpr SimulateLoops kLoops[3] = {
      {{{RowOfSteps<3, false, false>, RowOfSteps<3, false, true>},
        {RowOfSteps<3, true, false>, RowOfSteps<3, true, true>}}},
      {{{RowOfSteps<7, false, false>, RowOfSteps<7, false, true>},
        {RowOfSteps<7, true, false>, RowOfSteps<7, true, true>}}},
      {{{RowOfSteps<15, false, false>, RowOfSteps<15, false, true>},
        {RowOfSteps<15, true, false>, RowOfSteps<15, true, true>}}}};
  RunLoop(kLoops, values, count, levels, channel);
}

void SimulateAcross(const SimulatedValues& values, std::size_t count, const SimulatedLevels& levels) {
  static constexpr SimulateLoops kLoops[3] = {
      {{{AcrossOfLevels<3, false, false>, AcrossOfLevels<3, false, true>},
        {AcrossOfLevels<3, true, false>, AcrossOfLevels<3, true, true>}}},
      {{{AcrossOfLevels<7, false, false>, AcrossOfLevels<7, false, true>},
        {AcrossOfLevels<7, true, false>, AcrossOfLevels<7, true, true>}}},
      {{{AcrossOfLevels<15, false, false>, AcrossOfLevels<15, false, true>},
        {AcrossOfLevels<15, true, false>, AcrossOfLevels<15, true, true>}}}};
  RunLoop(kLoops, values, count, levels, 0);
}

// -- gradients ---------------------------------------------------------------------------------------------------

// Gradients to x: those of y where x lies inside or the mask is 0.
void GradientsToX(const float* __restrict grad, const float* __restrict mask, const std::int16_t* __restrict places,
                  std::size_t count, float* __restrict to_x) {
  constexpr auto kLast = static_cast<std::int16_t>(kPlaces - 1);
  if (mask == nullptr) {
    for (std::size_t i = 0; i < count; ++i) {
      const float inside = places[i] > 0 && places[i] < kLast ? 1.0F : 0.0F;
      to_x[i] = inside * grad[i];
    }
    return;
  }
  for (std::size_t i = 0; i < count; ++i) {
    const float inside = places[i] > 0 && places[i] < kLast ? 1.0F : 0.0F;
    const float quantized = grad[i] * mask[i];
    to_x[i] = (inside * quantized + grad[i]) - quantized;
  }
}

// found[i] = value[how many of the `first` codes are at most code + i]
template <std::size_t kSteps>
inline void PassedSteps(float code, std::size_t count, const float (&first)[kSimulatedLevels],
                        const float* value, float* __restrict found) {
  // Copies, which stay in registers.
  float limit[kSteps];
  float values[kSteps + 1];
  std::memcpy(limit, first, sizeof limit);
  std::memcpy(values, value, sizeof values);
  for (std::size_t i = 0; i < count; ++i) {
    const float here = code + static_cast<float>(static_cast<std::int32_t>(i));
    float passed = values[0];
    for (std::size_t s = 0; s < kSteps; ++s) {
      const float next = values[s + 1];
      passed = here >= limit[s] ? next : passed;
    }
    found[i] = passed;
  }
}

template <std::size_t kSteps>
void CodesOfSteps(const ChannelCodes& codes, float* __restrict weight, std::uint8_t* __restrict bin) {
  // Below the second level lies the first one, and behind the last but one the last: neither has to be passed.
  float first[kSimulatedLevels];
  float number[kSimulatedLevels];
  for (std::size_t s = 0; s < kSimulatedLevels; ++s) {
    first[s] = s + 1 < codes.steps ? codes.level[s + 1] : std::numeric_limits<float>::infinity();
    number[s] = static_cast<float>(static_cast<std::int32_t>(s + 1));
  }
  for (std::size_t begin = 0; begin < kCodes; begin += kBlock) {
    const std::size_t count = kCodes - begin < kBlock ? kCodes - begin : kBlock;
    const auto code = static_cast<float>(static_cast<std::int32_t>(begin));
    float below[kBlock];
    float above[kBlock];
    float above_number[kBlock];
    PassedSteps<kSteps>(code, count, first, codes.level, below);
    PassedSteps<kSteps>(code, count, first, codes.level + 1, above);
    PassedSteps<kSteps>(code, count, first, number, above_number);
    for (std::size_t i = 0; i < count; ++i) {
      const float here = code + static_cast<float>(static_cast<std::int32_t>(i));
      const float gap = above[i] - below[i];
      const float share = Limited((here - below[i]) / (gap > kSmallestGap ? gap : kSmallestGap), 0.0F, 1.0F);
      weight[begin + i] = (share >= 0.5F ? 1.0F : 0.0F) - share;
      bin[begin + i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(above_number[i]));
    }
  }
}

// For every code, the number of the level above it and how much of a gradient that level gets.
void CodeTables(const ChannelCodes& codes, float* weight, std::uint8_t* bin) {
  if (codes.steps <= 3) {
    CodesOfSteps<2>(codes, weight, bin);
  } else if (codes.steps <= 7) {
    CodesOfSteps<6>(codes, weight, bin);
  } else {
    CodesOfSteps<14>(codes, weight, bin);
  }
}

// -- error feedback ----------------------------------------------------------------------------------------------

// Codes of 8 bits on the grid of all levels.
void GridCodes(const float* __restrict x, std::size_t count, float step, float zero, std::uint8_t* __restrict codes) {
  for (std::size_t i = 0; i < count; ++i) {
    codes[i] = static_cast<std::uint8_t>(Rounded(Limited(x[i] / step + zero, 0.0F, 255.0F)));
  }
}

// All bits where the mask is 1, none where it is 0.
void MaskBytes(const float* __restrict mask, std::size_t count, std::uint8_t* __restrict kept) {
  for (std::size_t i = 0; i < count; ++i) {
    kept[i] = mask[i] != 0.0F ? std::uint8_t{255} : std::uint8_t{0};
  }
}

// The shifts of one channel, which stay 0 where nothing is kept, and what is left of its codes.
inline void Aim(const std::int32_t* __restrict sums, const std::uint8_t* __restrict kept,
                const std::uint8_t* __restrict codes, std::int16_t* __restrict shifts, std::uint8_t* __restrict aims) {
  for (std::size_t p = 0; p < kTilePositions; ++p) {
    const std::int32_t shift = kept == nullptr || kept[p] != 0 ? sums[p] : 0;
    const std::int32_t aim = std::int32_t{codes[p]} - shift;
    shifts[p] = static_cast<std::int16_t>(shift);
    aims[p] = static_cast<std::uint8_t>(aim < 0 ? 0 : aim > 255 ? 255 : aim);
  }
}

inline void KeepErrors(const std::uint8_t* __restrict kept, std::int16_t* __restrict errors) {
  for (std::size_t p = 0; p < kTilePositions; ++p) {
    errors[p] = kept[p] != 0 ? errors[p] : std::int16_t{0};
  }
}

// What FeedbackRequantize takes off the codes of a tile. All but the coefficients are rows of kTilePositions, by the
// channels' numbers; `kept` may be null.
void TileShifts(const FeedbackPlan& plan, const FeedbackScratch& scratch, const std::uint8_t* codes,
                const std::uint8_t* kept, std::int16_t* shifts) {
  std::int32_t sums[kTogether * kTilePositions];
  std::uint8_t aims[kTilePositions];
  std::uint8_t nearest[kTilePositions];
  const std::size_t even = Even(plan.rank);
  const std::int16_t* left = plan.left;
  std::size_t begin = 0;
  for (std::size_t group = 0; group < plan.groups; ++group) {
    const std::size_t end = plan.ends[group];
    const bool last = group + 1 == plan.groups;
    for (std::size_t i = begin; i < end; i += kTogether) {
      const std::size_t count = end - i < kTogether ? end - i : kTogether;
      if (group > 0 && count == kTogether) {
        StoreShifts<kTogether>(scratch.inner, plan.right + i * even, plan.rank, plan.right_scale + i, sums);
      } else if (group > 0) {
        for (std::size_t k = 0; k < count; ++k) {
          StoreShifts<1>(scratch.inner, plan.right + (i + k) * even, plan.rank, plan.right_scale + i + k,
                         sums + k * kTilePositions);
        }
      }
      for (std::size_t k = 0; k < count; ++k) {
        const std::size_t channel = plan.order[i + k];
        const std::size_t row = channel * kTilePositions;
        const std::uint8_t* const kept_row = kept == nullptr ? nullptr : kept + row;
        if (group > 0) {
          Aim(sums + k * kTilePositions, kept_row, codes + row, shifts + row, aims);
        } else {
          std::memset(shifts + row, 0, kTilePositions * sizeof *shifts);
        }
        if (!last) {
          std::int16_t* const errors = scratch.errors + (i + k - begin) * kTilePositions;
          Levels(group > 0 ? aims : codes + row, kTilePositions, plan.maps[channel * plan.map_step], nearest);
          Errors(nearest, codes + row, errors);
          if (kept != nullptr) {
            KeepErrors(kept_row, errors);
          }
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
}

}  // namespace
}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_SIMULATE_BODY_H_
