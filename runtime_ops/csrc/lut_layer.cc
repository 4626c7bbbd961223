#include "lut_layer.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <string>
#include <type_traits>
#include <utility>

#include "workspace.h"

namespace postquant {
namespace {

// A task shorter than this costs more to hand to another thread than to do.
constexpr double kTaskNanoseconds = 8000.0;

std::int64_t RowBytes(std::int64_t terms, int bits) { return (terms * bits + 7) / 8; }

std::int32_t ZeroPoint(const Tensor& tensor) {
  return tensor.type == abi::kUint8 ? std::int32_t{*tensor.As<std::uint8_t>()}
                                    : std::int32_t{*tensor.As<std::int8_t>()};
}

}  // namespace

template <typename T, typename Y>
Signature LutSignature(const char* name, const char* x) {
  constexpr abi::ElementType type = ElementTypeOf<T>::kValue;
  constexpr bool floats = std::is_same_v<Y, float>;
  Signature signature = {name,
                         {{x, type},
                          {"x_scale", abi::kFloat},
                          {"x_zero_point", type},
                          {"codes", abi::kUint8},
                          {"table", abi::kInt8},
                          {"w_scale", abi::kFloat},
                          {"bias", floats ? abi::kFloat : abi::kInt32}},
                         {{"y", ElementTypeOf<Y>::kValue}}};
  if (!floats) {
    signature.inputs.push_back({"y_scale", abi::kFloat});
    signature.inputs.push_back({"y_zero_point", type});
  }
  return signature;
}

template Signature LutSignature<std::uint8_t, std::uint8_t>(const char* name, const char* x);
template Signature LutSignature<std::int8_t, std::int8_t>(const char* name, const char* x);
template Signature LutSignature<std::uint8_t, float>(const char* name, const char* x);
template Signature LutSignature<std::int8_t, float>(const char* name, const char* x);

int LutBits(const NodeInfo& info) {
  const auto bits = static_cast<int>(info.Int("bits", 2, 4));
  if (bits == 3) {
    info.identity().Fail("attribute 'bits' is 3, expected 2 or 4.");
  }
  return bits;
}

LutLayer::LutLayer(const NodeInfo& info, int bits, std::int64_t outputs, std::int64_t terms, Prepare prepare)
    : identity_(info.identity()),
      bits_(bits),
      outputs_(outputs),
      terms_(terms),
      prepare_(std::move(prepare)),
      inputs_(info, kXScale) {
  const Tensors& at = inputs_.constants();
  for (std::size_t input = kXScale; input < input_count(); ++input) {
    if (inputs_.constant(input)) {
      Validate(at[input], input);
    }
  }
  if (inputs_.constant(kCodes) && inputs_.constant(kTable)) {
    ready_.weights = MakeWeights(at[kCodes], at[kTable]);
  }
  if (inputs_.all_constant()) {
    ready_.requantizer = MakeRequantizer(*ready_.weights, at);
  }
}

void LutLayer::Validate(const Tensor& tensor, std::size_t input) const {
  switch (input) {
    case kCodes:
      identity_.ExpectShape(tensor, input, {outputs_, RowBytes(terms_, bits_)});
      break;
    case kTable:
      identity_.ExpectShape(tensor, input, {std::int64_t{1} << bits_});
      break;
    case kWScale:
      identity_.ExpectShape(tensor, input, {outputs_});
      identity_.ExpectScales(tensor, input);
      break;
    case kBias:
      identity_.ExpectShape(tensor, input, {outputs_});
      if (float_output()) {
        identity_.ExpectFinite(tensor, input);
      }
      break;
    default:
      identity_.ExpectShape(tensor, input, {});
      if (tensor.type == abi::kFloat) {
        identity_.ExpectScales(tensor, input);
      }
  }
}

LutLayer::Ready LutLayer::Acquire(const Run& run) {
  if (ready_.requantizer != nullptr) {
    return ready_;
  }
  const Tensors at = inputs_.Read(run);
  for (std::size_t input = kXScale; input < input_count(); ++input) {
    if (!inputs_.constant(input)) {
      Validate(at[input], input);
    }
  }
  Ready ready = ready_;
  if (ready.weights == nullptr) {
    ready.weights = CachedWeights(at[kCodes], at[kTable]);
  }
  ready.requantizer = MakeRequantizer(*ready.weights, at);
  return ready;
}

std::shared_ptr<const lut::Weights> LutLayer::MakeWeights(const Tensor& codes, const Tensor& table) const {
  lut::WeightsPtr weights;
  Check(prepare_({codes.As<std::uint8_t>(), bits_, table.As<std::int8_t>()}, &weights), codes.shape);
  return weights;
}

std::shared_ptr<const lut::Weights> LutLayer::CachedWeights(const Tensor& codes, const Tensor& table) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto* const code_bytes = codes.As<std::uint8_t>();
  const auto* const table_bytes = static_cast<const std::uint8_t*>(static_cast<const void*>(table.As<std::int8_t>()));
  const bool same = cached_ != nullptr && cached_bytes_.size() == codes.count + table.count &&
                    std::equal(code_bytes, code_bytes + codes.count, cached_bytes_.data()) &&
                    std::equal(table_bytes, table_bytes + table.count, cached_bytes_.data() + codes.count);
  if (!same) {
    cached_ = nullptr;
    cached_bytes_.assign(code_bytes, code_bytes + codes.count);
    cached_bytes_.insert(cached_bytes_.end(), table_bytes, table_bytes + table.count);
    cached_ = MakeWeights(codes, table);
  }
  return cached_;
}

std::shared_ptr<const lut::Requantizer> LutLayer::MakeRequantizer(const lut::Weights& weights,
                                                                  const Tensors& at) const {
  lut::Numbers numbers = {};
  numbers.x_scale = *at[kXScale].As<float>();
  numbers.x_zero_point = ZeroPoint(at[kXZeroPoint]);
  numbers.x_signed = at[kXZeroPoint].type == abi::kInt8;
  numbers.w_scale = at[kWScale].As<float>();
  if (float_output()) {
    numbers.float_bias = at[kBias].As<float>();
  } else {
    numbers.y_scale = *at[kYScale].As<float>();
    numbers.y_zero_point = ZeroPoint(at[kYZeroPoint]);
    numbers.y_signed = at[kYZeroPoint].type == abi::kInt8;
    numbers.bias = at[kBias].As<std::int32_t>();
  }
  lut::RequantizerPtr requantizer;
  Check(lut::PrepareRequantizer(weights, numbers, &requantizer), at[kWScale].shape);
  return requantizer;
}

void LutLayer::Check(lut::Status status, const Shape& input) const {
  switch (status) {
    case lut::Status::kOk:
      return;
    case lut::Status::kOutOfMemory:
      throw std::bad_alloc();
    case lut::Status::kBadNumbers:
      identity_.Fail(std::string("x_scale * w_scale") + (float_output() ? "" : " / y_scale") +
                     " is not a finite number for some output channel.");
    case lut::Status::kBadShape:
      break;
  }
  identity_.Fail("an input of shape " + input.Text() + " does not fit the attributes, or is too large.");
}

void LutLayer::Execute(const Run& run, const Ready& ready, const lut::Plan& plan, const void* x, void* y) const {
  Workspace workspace(plan.workspace);
  void* const scratch = workspace.data();
  for (int phase = 0; phase < lut::kPhases; ++phase) {
    const std::int64_t items = plan.items[phase];
    const double wanted = std::ceil(static_cast<double>(items) * plan.cost[phase] / kTaskNanoseconds);
    const auto tasks = static_cast<std::int64_t>(std::clamp(wanted, 1.0, std::max(1.0, static_cast<double>(items))));
    const auto part = [&](std::size_t task) noexcept {
      const auto index = static_cast<std::int64_t>(task);
      const auto begin = items / tasks * index + std::min(index, items % tasks);
      const auto end = begin + items / tasks + (index < items % tasks ? 1 : 0);
      lut::Run(*ready.weights, *ready.requantizer, plan, phase, begin, end, x, y, scratch);
    };
    if (items == 0) {
      continue;
    }
    if (tasks == 1) {
      part(0);
    } else {
      run.ParallelFor(static_cast<std::size_t>(tasks), part);
    }
  }
}

}  // namespace postquant
