#include "border_coefficients.h"

#include <cstdlib>
#include <limits>
#include <string>

namespace postquant {
namespace {

// Sums of residuals (at most 64 in size) then fit int16 within a window, and float32 is exact across channels.
constexpr std::int32_t kWindowWeight = 511;
constexpr std::int64_t kMostChannels = 2064;
constexpr std::int64_t kMostRank = 1040;
constexpr std::int64_t kMostSize = std::numeric_limits<std::int32_t>::max();

// Coefficients are in [-127, 127]. Returns whether one is not 0.
bool CheckCoefficients(const Identity& identity, const Tensor& tensor, std::size_t input) {
  const auto* const values = tensor.As<std::int8_t>();
  bool some = false;
  for (std::size_t i = 0; i < tensor.count; ++i) {
    if (values[i] == -128) {
      identity.FailInput(input, "holds -128 at position " + std::to_string(i) + ", expected -127 to 127");
    }
    some = some || values[i] != 0;
  }
  return some;
}

void CheckWindow(const Identity& identity, const Tensor& window, std::size_t channels) {
  const auto* const values = window.As<std::int8_t>();
  const std::size_t taps = window.count / channels;
  for (std::size_t channel = 0; channel < channels; ++channel) {
    std::int64_t weight = 0;
    for (std::size_t tap = 0; tap < taps; ++tap) {
      weight += std::abs(std::int32_t{values[channel * taps + tap]});
    }
    if (weight > kWindowWeight) {
      identity.FailInput(kBorderWindow, "has an absolute sum of " + std::to_string(weight) + " in channel " +
                                            std::to_string(channel) + ", expected at most " +
                                            std::to_string(kWindowWeight));
    }
  }
}

void CheckShapes(const Identity& identity, const BorderAttributes& attributes, const Tensors& inputs) {
  const std::int64_t channels = attributes.channels;
  const std::int64_t levels = attributes.qmax - attributes.qmin + 1;
  identity.ExpectShape(inputs[kBorderScale], kBorderScale, {});
  identity.ExpectShape(inputs[kBorderZeroPoint], kBorderZeroPoint, {});
  if (!(inputs[kBorderTable].shape == Shape{channels, 1})) {
    identity.ExpectShape(inputs[kBorderTable], kBorderTable, {channels, levels});
  }
  const Shape& window = inputs[kBorderWindow].shape;
  if (window.rank() != 3 || window[0] != channels || window[1] % 2 != 1 || window[2] % 2 != 1) {
    identity.FailInput(kBorderWindow, "has shape " + window.Text() + ", expected " + std::to_string(channels) +
                                          " channels and two odd sizes");
  }
  identity.ExpectShape(inputs[kBorderWindowScale], kBorderWindowScale, {channels});
  const Shape& left = inputs[kBorderLeft].shape;
  if (left.rank() != 2 || left[1] != channels) {
    identity.FailInput(kBorderLeft, "has shape " + left.Text() + ", expected two sizes, the second " +
                                        std::to_string(channels));
  }
  const std::int64_t rank = left[0];
  if (rank > kMostRank || (rank > 0 && channels > kMostChannels)) {
    identity.FailInput(kBorderLeft, "has shape " + left.Text() + ", expected at most " + std::to_string(kMostRank) +
                                        " rows and " + std::to_string(kMostChannels) + " channels");
  }
  identity.ExpectShape(inputs[kBorderLeftScale], kBorderLeftScale, {rank});
  identity.ExpectShape(inputs[kBorderRight], kBorderRight, {channels, rank});
  identity.ExpectShape(inputs[kBorderRightScale], kBorderRightScale, {channels});
}

// A matrix whose rows are filled up with a 0 to an even length.
std::vector<std::int16_t> Paired(const Tensor& matrix, std::size_t rows, std::size_t columns) {
  const auto* const from = matrix.As<std::int8_t>();
  const std::size_t stride = quantize::Even(columns);
  std::vector<std::int16_t> paired(rows * stride);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t column = 0; column < columns; ++column) {
      paired[row * stride + column] = from[row * columns + column];
    }
  }
  return paired;
}

}  // namespace

BorderAttributes::BorderAttributes(const NodeInfo& info) : channels(info.Int("channels", 1, kMostSize)) {
  qmin = static_cast<std::int32_t>(info.Int("qmin", 0, 254));
  qmax = static_cast<std::int32_t>(info.Int("qmax", qmin + 1, 255));
}

BorderCoefficients::BorderCoefficients(const Identity& identity, const BorderAttributes& attributes,
                                       const Tensors& inputs) {
  CheckShapes(identity, attributes, inputs);
  identity.ExpectScales(inputs[kBorderScale], kBorderScale);
  for (const BorderInput input : {kBorderTable, kBorderWindowScale, kBorderLeftScale, kBorderRightScale}) {
    identity.ExpectFinite(inputs[input], input);
  }
  has_window = CheckCoefficients(identity, inputs[kBorderWindow], kBorderWindow);
  CheckCoefficients(identity, inputs[kBorderLeft], kBorderLeft);
  CheckCoefficients(identity, inputs[kBorderRight], kBorderRight);
  channels = static_cast<std::size_t>(attributes.channels);
  CheckWindow(identity, inputs[kBorderWindow], channels);
  scale = *inputs[kBorderScale].As<float>();
  range = {*inputs[kBorderZeroPoint].As<std::uint8_t>(), attributes.qmin, attributes.qmax};
  levels = static_cast<std::int32_t>(inputs[kBorderTable].shape[1]);
  table = inputs[kBorderTable].As<float>();
  window = inputs[kBorderWindow].As<std::int8_t>();
  rows = static_cast<std::size_t>(inputs[kBorderWindow].shape[1]);
  columns = static_cast<std::size_t>(inputs[kBorderWindow].shape[2]);
  window_scale = inputs[kBorderWindowScale].As<float>();
  rank = static_cast<std::size_t>(inputs[kBorderLeft].shape[0]);
  left = Paired(inputs[kBorderLeft], rank, channels);
  left_scale = inputs[kBorderLeftScale].As<float>();
  right = Paired(inputs[kBorderRight], channels, rank);
  right_scale = inputs[kBorderRightScale].As<float>();
}

}  // namespace postquant
