// Code books of activations while they are learned: the values of one tensor, and gradients.
#ifndef POSTQUANT_CSRC_SIMULATE_PASSES_H_
#define POSTQUANT_CSRC_SIMULATE_PASSES_H_

#include <cstdint>

#include "simulate_levels.h"

namespace postquant::quantize {

// The numbers of `call` are in range. std::bad_alloc if there is no memory.
void SimulateLevels(const PostquantLevels& call, const float* x, float* y, std::int16_t* places);

// Gradients: each of both results may be null.
void SimulateLevelsBack(const PostquantLevels& call, const float* grad, const std::int16_t* places, float* to_x,
                        float* to_levels);

}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_SIMULATE_PASSES_H_
