#include "adaptive_step.h"

#include <cmath>
#include <string>

namespace postquant {
namespace {

// Positions relative to input `step`.
enum Network : std::size_t { kStep, kZeroPoint, kW1, kB1, kW2, kB2 };

}  // namespace

void ReadCodeRange(const NodeInfo& info, std::int32_t* qmin, std::int32_t* qmax) {
  *qmin = static_cast<std::int32_t>(info.Int("qmin", 0, 254));
  *qmax = static_cast<std::int32_t>(info.Int("qmax", *qmin + 1, 255));
}

AdaptiveStep::AdaptiveStep(const NodeInfo& info, std::size_t network)
    : network_(network),
      features_(info.Int("features", 1, 7)),
      beta_min_(info.Float("beta_min")),
      beta_max_(info.Float("beta_max")) {
  ReadCodeRange(info, &qmin_, &qmax_);
  if (!(beta_min_ > 0.0F) || !(beta_min_ <= beta_max_)) {
    info.identity().Fail("attributes 'beta_min' and 'beta_max' are " + std::to_string(beta_min_) + " and " +
                         std::to_string(beta_max_) + ", expected 0 < beta_min <= beta_max.");
  }
}

void AdaptiveStep::Validate(const Identity& identity, const Tensors& inputs) const {
  const auto at = [&](Network which) -> const Tensor& { return inputs[network_ + which]; };
  identity.ExpectShape(at(kStep), network_ + kStep, {});
  identity.ExpectScales(at(kStep), network_ + kStep);
  identity.ExpectShape(at(kZeroPoint), network_ + kZeroPoint, {});
  const Shape& w1 = at(kW1).shape;
  if (w1.rank() != 2 || w1[0] < 1) {
    identity.FailInput(network_ + kW1, "has shape " + w1.Text() + ", expected two sizes, the first at least 1");
  }
  const std::int64_t hidden = w1[0];
  identity.ExpectShape(at(kB1), network_ + kB1, {hidden});
  identity.ExpectShape(at(kW2), network_ + kW2, {1, hidden});
  identity.ExpectShape(at(kB2), network_ + kB2, {1});
  for (const Network which : {kW1, kB1, kW2, kB2}) {
    identity.ExpectFinite(at(which), network_ + which);
  }
}

std::size_t AdaptiveStep::FeatureCount(std::size_t channels) const {
  return ((features_ & 1) != 0 ? channels : 0) + (wants_squares() ? 1 : 0) + (wants_largest() ? 1 : 0);
}

void AdaptiveStep::ValidateChannels(const Identity& identity, const Tensors& inputs, std::int64_t channels) const {
  const Shape& w1 = inputs[network_ + kW1].shape;
  const auto features = static_cast<std::int64_t>(FeatureCount(static_cast<std::size_t>(channels)));
  if (w1[1] != features) {
    identity.FailInput(network_ + kW1, "has " + std::to_string(w1[1]) + " columns, expected " +
                                           std::to_string(features) + " for an input of " + std::to_string(channels) +
                                           " channels");
  }
}

float AdaptiveStep::Step(const Tensors& inputs, const quantize::Moments* moments, std::size_t channels,
                         std::size_t points, double unit, std::vector<double>* scratch) const {
  std::vector<double>& pooled = *scratch;
  pooled.clear();
  double sum = 0.0;
  double squares = 0.0;
  double largest = 0.0;
  for (std::size_t c = 0; c < channels; ++c) {
    if ((features_ & 1) != 0) {
      pooled.push_back(moments[c].sum / static_cast<double>(points) * unit);
    }
    sum += moments[c].sum;
    squares += moments[c].squares;
    largest = moments[c].largest > largest ? moments[c].largest : largest;
  }
  const double count = static_cast<double>(channels) * static_cast<double>(points);
  if (wants_squares()) {
    const double mean = sum / count;
    const double variance = squares / count - mean * mean;
    pooled.push_back(std::sqrt(variance > 0.0 ? variance : 0.0) * unit);
  }
  if (wants_largest()) {
    pooled.push_back(largest * unit);
  }
  const auto hidden = static_cast<std::size_t>(inputs[network_ + kW1].shape[0]);
  const float* const w1 = inputs[network_ + kW1].As<float>();
  const float* const b1 = inputs[network_ + kB1].As<float>();
  const float* const w2 = inputs[network_ + kW2].As<float>();
  double beta = 0.0;
  for (std::size_t h = 0; h < hidden; ++h) {
    double value = 0.0;
    for (std::size_t f = 0; f < pooled.size(); ++f) {
      value += static_cast<double>(w1[h * pooled.size() + f]) * pooled[f];
    }
    value += static_cast<double>(b1[h]);
    beta += static_cast<double>(w2[h]) * (value > 0.0 ? value : 0.0);
  }
  beta += static_cast<double>(*inputs[network_ + kB2].As<float>());
  const auto low = static_cast<double>(beta_min_);
  const auto high = static_cast<double>(beta_max_);
  beta = beta > low ? beta : low;  // not a number becomes beta_min
  beta = beta < high ? beta : high;
  return *inputs[network_ + kStep].As<float>() * static_cast<float>(beta);
}

quantize::CodeRange AdaptiveStep::Range(const Tensors& inputs) const {
  return {*inputs[network_ + kZeroPoint].As<std::uint8_t>(), qmin_, qmax_};
}

}  // namespace postquant
