// Code books of activations while they are learned: what the simulation does with elements, compiled per instruction
// set as part of the table of quantize_kernels.h.
//
// Between the first and the last level of a channel lies a grid of `cells`. An element x has a place on it,
//
//     place = round_half_even(clip((x - low) * per_unit + 1, 0, cells + 2)),
//
// 0 and cells + 2 for what lies outside, and the level that is nearest to its cell. All of that is single float32
// operations in this order, so that every instruction set gives the bits of calib/learn/levels.py.
#ifndef POSTQUANT_CSRC_SIMULATE_KERNELS_H_
#define POSTQUANT_CSRC_SIMULATE_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace postquant::quantize {

constexpr std::size_t kSimulatedLevels = 16;
constexpr float kSmallestGap = 1e-30F;
constexpr std::size_t kSimulatedSteps = kSimulatedLevels - 1;

// Of `channels` channels: the s-th number of channel c is that at c * channel_step + s * level_step.
struct SimulatedLevels {
  std::size_t channels;
  std::size_t channel_step;
  std::size_t level_step;
  std::size_t steps;      // levels but one: 1 to kSimulatedSteps
  float last;             // place: cells + 2
  const float* low;       // [channels]
  const float* per_unit;  // [channels]
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

// Where the cells of one channel's grid lie: for tables of what they mean to the levels beside them.
struct CellGrid {
  std::size_t cells;
  const float* position;           // [cells + 1]: k / cells
  float span;                      // from the first to the last level
  std::size_t steps;               // levels but one
  float level[kSimulatedLevels];
  float first[kSimulatedLevels];   // cell that lies behind a level; infinite from the last one on
};

}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_SIMULATE_KERNELS_H_
