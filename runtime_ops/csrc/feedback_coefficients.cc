#include "feedback_coefficients.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

namespace postquant {
namespace {

// Sums of numbers up to 127 times these stay below 2^24, where float32, in which the law is written, is exact.
constexpr std::int64_t kRowWeight = (1 << 24) / 127;
constexpr std::int64_t kFewestChannels = 2;

void CheckRows(const Identity& identity, const Tensor& matrix, std::size_t input) {
  const auto* const values = matrix.As<std::int8_t>();
  const auto columns = static_cast<std::size_t>(matrix.shape[1]);
  std::int64_t weight = 0;
  for (std::size_t i = 0; i < matrix.count; ++i) {
    if (values[i] == -128) {
      identity.FailInput(input, "holds -128 at position " + std::to_string(i) + ", expected -127 to 127");
    }
    weight = (i % columns == 0 ? 0 : weight) + std::abs(std::int32_t{values[i]});
    if (weight > kRowWeight) {
      identity.FailInput(input, "has an absolute sum beyond " + std::to_string(kRowWeight) + " in row " +
                                    std::to_string(i / columns));
    }
  }
}

void Check(const Identity& identity, std::size_t cell, const Tensors& inputs) {
  CheckLevels(identity, inputs);
  const Tensor& group = inputs[kFeedbackGroup];
  if (group.shape.rank() != 1 || group.shape[0] < kFewestChannels) {
    identity.FailInput(kFeedbackGroup, "has shape " + group.shape.Text() + ", expected one size, at least " +
                                           std::to_string(kFewestChannels));
  }
  const std::int64_t channels = group.shape[0];
  const auto places = static_cast<std::int64_t>(cell * cell);
  if (channels % places != 0) {
    identity.FailInput(kFeedbackGroup, "has shape " + group.shape.Text() + ", expected a multiple of " +
                                           std::to_string(places) + " for cells of " + std::to_string(cell));
  }
  const std::int64_t rows = inputs[kLevelTable].shape[0];
  if (rows != 1 && rows != channels / places) {
    identity.FailInput(kLevelTable, "has shape " + inputs[kLevelTable].shape.Text() + ", expected 1 or " +
                                        std::to_string(channels / places) + " rows");
  }
  const Shape& left = inputs[kFeedbackLeft].shape;
  if (left.rank() != 2 || left[0] < 1 || left[1] != channels) {
    identity.FailInput(kFeedbackLeft, "has shape " + left.Text() + ", expected at least 1 row of " +
                                          std::to_string(channels) + " numbers");
  }
  identity.ExpectShape(inputs[kFeedbackLeftScale], kFeedbackLeftScale, {left[0]});
  identity.ExpectShape(inputs[kFeedbackRight], kFeedbackRight, {channels, left[0]});
  identity.ExpectShape(inputs[kFeedbackRightScale], kFeedbackRightScale, {channels});
  identity.ExpectFinite(inputs[kFeedbackLeftScale], kFeedbackLeftScale);
  identity.ExpectFinite(inputs[kFeedbackRightScale], kFeedbackRightScale);
  CheckRows(identity, inputs[kFeedbackLeft], kFeedbackLeft);
  CheckRows(identity, inputs[kFeedbackRight], kFeedbackRight);
  const auto* const groups = group.As<std::uint8_t>();
  for (std::size_t i = 0; i < group.count; ++i) {
    if (groups[i] >= quantize::kFeedbackGroups) {
      identity.FailInput(kFeedbackGroup, "holds " + std::to_string(groups[i]) + " at position " + std::to_string(i) +
                                             ", expected 0 to " + std::to_string(quantize::kFeedbackGroups - 1));
    }
  }
}

}  // namespace

FeedbackCoefficients::FeedbackCoefficients(const Identity& identity, const quantize::Kernels& kernels,
                                           std::size_t cell, const Tensors& inputs) {
  Check(identity, cell, inputs);
  plan_.cell = cell;
  plan_.channels = inputs[kFeedbackGroup].count;
  plan_.rank = inputs[kFeedbackLeftScale].count;
  SortChannels(inputs[kFeedbackGroup].As<std::uint8_t>());
  MakeMaps(inputs[kLevelTable]);
  MakeCodes(kernels, inputs);
  MakeMatrices(inputs);
}

void FeedbackCoefficients::SortChannels(const std::uint8_t* group) {
  for (std::uint8_t g = 0; g < quantize::kFeedbackGroups; ++g) {
    const std::size_t begin = order_.size();
    for (std::size_t channel = 0; channel < plan_.channels; ++channel) {
      if (group[channel] == g) {
        order_.push_back(channel);
      }
    }
    if (order_.size() > begin) {
      plan_.ends[plan_.groups++] = order_.size();
      largest_group_ = std::max(largest_group_, order_.size() - begin);
    }
  }
  plan_.order = order_.data();
}

void FeedbackCoefficients::MakeMaps(const Tensor& table) {
  std::uint8_t all[kCodes];
  for (std::size_t i = 0; i < kCodes; ++i) {
    all[i] = static_cast<std::uint8_t>(i);
  }
  const auto* const levels = table.As<std::uint8_t>();
  const auto count = static_cast<std::size_t>(table.shape[1]);
  maps_.resize(static_cast<std::size_t>(table.shape[0]));
  for (std::size_t row = 0; row < maps_.size(); ++row) {
    MakeMap(levels + row * count, count, all, &maps_[row]);
  }
  plan_.maps = maps_.data();
  plan_.map_step = maps_.size() == 1 ? 0 : 1;
}

void FeedbackCoefficients::MakeCodes(const quantize::Kernels& kernels, const Tensors& inputs) {
  codes_ = CodesOfLevels(kernels, inputs);
  plan_.codes = codes_.data();
  plan_.x_scale = *inputs[kLevelXScale].As<float>();
  plan_.x_zero_point = *inputs[kLevelXZeroPoint].As<std::uint8_t>();
  plan_.range = {*inputs[kLevelZeroPoint].As<std::uint8_t>(), 0, 255};
  // A product with the reciprocal is faster than a look-up, and almost always the same for all codes.
  const float scale = *inputs[kLevelScale].As<float>();
  const float reciprocal = 1.0F / scale;
  const auto low = static_cast<float>(plan_.range.low - plan_.range.zero_point);
  const auto high = static_cast<float>(plan_.range.high - plan_.range.zero_point);
  bool equal = scale > 1e-37F && scale < 1e37F;
  plan_.same_codes = true;
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(kCodes); ++i) {
    const std::int32_t code = codes_[static_cast<std::size_t>(i)];
    const float real = static_cast<float>(i - plan_.x_zero_point) * plan_.x_scale;
    const float rounded = std::nearbyint(std::min(std::max(real * reciprocal, low), high));
    equal = equal && rounded == static_cast<float>(code - plan_.range.zero_point);
    plan_.same_codes = plan_.same_codes && code == i;
  }
  plan_.reciprocal = equal ? reciprocal : 0.0F;
}

void FeedbackCoefficients::MakeMatrices(const Tensors& inputs) {
  const auto* const left = inputs[kFeedbackLeft].As<std::int8_t>();
  const auto* const right = inputs[kFeedbackRight].As<std::int8_t>();
  const auto* const right_scale = inputs[kFeedbackRightScale].As<float>();
  std::size_t begin = 0;
  for (std::size_t group = 0; group < plan_.groups; ++group) {
    const std::size_t size = plan_.ends[group] - begin;
    for (std::size_t r = 0; r < plan_.rank; ++r) {
      for (std::size_t i = 0; i < size; ++i) {
        left_.push_back(left[r * plan_.channels + order_[begin + i]]);
      }
      left_.resize(left_.size() + quantize::Even(size) - size);
    }
    begin = plan_.ends[group];
  }
  for (const std::size_t channel : order_) {
    right_.insert(right_.end(), right + channel * plan_.rank, right + (channel + 1) * plan_.rank);
    right_.resize(right_.size() + quantize::Even(plan_.rank) - plan_.rank);
    right_scale_.push_back(right_scale[channel]);
  }
  plan_.left = left_.data();
  plan_.left_scale = inputs[kFeedbackLeftScale].As<float>();
  plan_.right = right_.data();
  plan_.right_scale = right_scale_.data();
}

}  // namespace postquant
