// Inputs and attributes of BorderQuantize, checked, in the form in which the computation wants them.
#ifndef POSTQUANT_CSRC_BORDER_COEFFICIENTS_H_
#define POSTQUANT_CSRC_BORDER_COEFFICIENTS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "node.h"
#include "quantize_kernels.h"
#include "side_inputs.h"

namespace postquant {

enum BorderInput : std::size_t {
  kBorderX,
  kBorderScale,
  kBorderZeroPoint,
  kBorderTable,
  kBorderWindow,
  kBorderWindowScale,
  kBorderLeft,
  kBorderLeftScale,
  kBorderRight,
  kBorderRightScale,
};

struct BorderAttributes {
  explicit BorderAttributes(const NodeInfo& info);

  std::int64_t channels;
  std::int32_t qmin;
  std::int32_t qmax;
};

// Holds pointers into the inputs; valid as long as they are.
struct BorderCoefficients {
  // OperatorError if something does not fit.
  BorderCoefficients(const Identity& identity, const BorderAttributes& attributes, const Tensors& inputs);

  quantize::ChannelBorder Channel(std::size_t channel) const {
    return {table + channel * static_cast<std::size_t>(levels), levels, window_scale[channel], right_scale[channel]};
  }

  float scale;
  quantize::CodeRange range;
  std::size_t channels;
  std::int32_t levels;
  const float* table;  // [channels, levels]
  const std::int8_t* window;  // [channels, rows, columns]
  std::size_t rows;
  std::size_t columns;
  const float* window_scale;  // [channels]
  std::size_t rank;
  std::vector<std::int16_t> left;  // [rank, Even(channels)]
  const float* left_scale;  // [rank]
  std::vector<std::int16_t> right;  // [channels, Even(rank)]
  const float* right_scale;  // [channels]
  bool has_window;  // some coefficient is not 0
};

}  // namespace postquant

#endif  // POSTQUANT_CSRC_BORDER_COEFFICIENTS_H_
