// The table of quantize_kernels.h, made anew in each translation unit that includes this.
#ifndef POSTQUANT_CSRC_QUANTIZE_BODY_H_
#define POSTQUANT_CSRC_QUANTIZE_BODY_H_

#include "adaptive_body.h"
#include "border_across_body.h"
#include "border_body.h"
#include "feedback_body.h"
#include "levels_body.h"
#include "quantize_kernels.h"
#include "simulate_body.h"

namespace postquant::quantize {
namespace {

constexpr Kernels kKernels = {PoolAnyFloat, PoolCodes, Quantize, Requantize, Border, Residual, SpreadRows,
                              GatherRows,   Window,    Mix,      Combine,    Decide, kLooksUp, Levels,  LevelsAcross,
                              Feedback,     SimulateRow, SimulateAcross, GradientsToX, CodeTables, GridCodes,
                              MaskBytes,    TileShifts,  Turn};

}  // namespace
}  // namespace postquant::quantize

#endif  // POSTQUANT_CSRC_QUANTIZE_BODY_H_
