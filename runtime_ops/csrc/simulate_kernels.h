// Code books of activations while they are learned: what the simulation does with elements, compiled per instruction
// set as part of the table of quantize_kernels.h.
//
// Levels are among 256 codes. An element x has the place of its code,
//
//     place = round_half_even(clip((x - low) * per_unit + 1, 0, 257)),
//
// but 0 below the first level of its channel and 257 above the last one, and the level that is nearest to its code. All
// of that is single float32 operations in this order, so that every instruction set gives the bits of
// calib/learn/levels.py.
#ifndef POSTQUANT_CSRC_SIMULATE_KERNELS_H_
#define POSTQUANT_CSRC_SIMULATE_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace postquant::quantize {

constexpr std::size_t kSimulatedLevels = 16;
constexpr float kSmallestGap = 1e-30F;
constexpr std::size_t kSimulatedSteps = kSimulatedLevels - 1;
constexpr std::size_t kCodes = 256;
constexpr std::size_t kPlaces = kCodes + 2;
constexpr float kLastPlace = kPlaces - 1;

// Of `channels` channels: the s-th number of channel c is that at c * channel_step + s * level_step.
struct SimulatedLevels {
  std::size_t channels;
  std::size_t channel_step;
  std::size_t level_step;
  std::size_t steps;      // levels but one: 1 to kSimulatedSteps
  float low;              // what code 0 stands for
  float per_unit;         // codes per unit of x
  const float* bottom;    // [channels], the first level's place
  const float* top;       // [channels], the last level's place
  const float* first;     // the first place that gets level s + 1 or a higher one; infinite behind the last step
  const float* level;
};

// Some elements; `mask` and `shift` may be null. Those whose mask is 0 stay as they are.
struct SimulatedValues {
  const float* x;
  const float* mask;
  const std::int16_t* shift;  // what error feedback takes off, in units of `step`
  float step;
  float* y;
  std::int16_t* places;
};

// The codes of one channel's levels: for tables of what codes mean to the levels beside them.
struct ChannelCodes {
  std::size_t steps;              // levels but one
  float level[kSimulatedLevels];  // codes, the last one repeated
};

}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_SIMULATE_KERNELS_H_
