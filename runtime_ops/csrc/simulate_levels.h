// The library's entry points for learning: code books of activations, simulated with their gradients. Python calls
// them through ctypes (calib/learn/native_levels.py), which lays out these structs and checks shapes and types.
//
// x is float32 [outer][channels][inner]. Any number of threads may call with the same parameters.
#ifndef POSTQUANT_CSRC_SIMULATE_LEVELS_H_
#define POSTQUANT_CSRC_SIMULATE_LEVELS_H_

#include <cstdint>

extern "C" {

// Coefficients as quantize::FeedbackPlan has them.
struct PostquantFeedback {
  std::int64_t rank;
  std::int64_t groups;
  const std::int64_t* ends;   // [groups], the last one is the number of channels
  const std::int64_t* order;  // [channels]
  const std::int16_t* left;
  const float* left_scale;
  const std::int16_t* right;
  const float* right_scale;
};

struct PostquantLevels {
  std::int64_t outer;
  std::int64_t channels;
  std::int64_t inner;
  std::int64_t count;                 // levels of a channel, 2 to 16
  const float* levels;                // [channels][count], sorted
  const float* mask;                  // as x, 0 or 1; or null
  const PostquantFeedback* feedback;  // or null; only for two channels or more
};

// Both return 0, or 1 where the numbers are out of range, or 2 where there is no memory.
int postquant_simulate_levels(const PostquantLevels* call, const float* x, float* y, std::int16_t* places) noexcept;
// to_x as x, to_levels [channels][count]: either may be null.
int postquant_simulate_levels_back(const PostquantLevels* call, const float* grad, const std::int16_t* places,
                                   float* to_x, float* to_levels) noexcept;

}  // extern "C"

#endif  // POSTQUANT_CSRC_SIMULATE_LEVELS_H_
