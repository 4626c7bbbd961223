// Makes Weights and Requantizer.
#include <cmath>

#include "lut_weights.h"

namespace postquant::lut {
namespace {

// A single input channel per group with few outputs is a depthwise convolution; with more, the matrix product is
// better.
constexpr std::int64_t kDepthwiseOutputs = 8;

// More terms of one sum than any memory holds: refused before sizes can overflow.
constexpr std::int64_t kMostInputs = std::int64_t{1} << 48;

bool Valid(const ConvGeometry& g) {
  if (g.out_channels < 0 || g.in_channels < 1 || g.group < 1 || g.out_channels % g.group != 0 ||
      g.in_channels % g.group != 0) {
    return false;
  }
  for (int axis = 0; axis < 2; ++axis) {
    constexpr std::int64_t kMost = std::int64_t{1} << 30;
    if (g.kernel[axis] < 1 || g.stride[axis] < 1 || g.dilation[axis] < 1 || g.pad_begin[axis] < 0 ||
        g.pad_end[axis] < 0 || g.kernel[axis] > kMost || g.stride[axis] > kMost || g.dilation[axis] > kMost ||
        g.pad_begin[axis] > kMost || g.pad_end[axis] > kMost) {
      return false;
    }
  }
  return true;
}

const KernelTable* ChosenTable(const Isa* isa) { return &TableOf(isa != nullptr ? *isa : SelectedIsa()); }

}  // namespace

void Release::operator()(Weights* weights) const noexcept { delete weights; }
void Release::operator()(Requantizer* requantizer) const noexcept { delete requantizer; }

Status PrepareMatMul(const Codes& codes, std::int64_t outputs, std::int64_t inputs, const Isa* isa, WeightsPtr* out) {
  std::int64_t count = 0;
  if (!Multiply(outputs, inputs, &count) || outputs > kMostInputs || inputs > kMostInputs) {
    return Status::kBadShape;
  }
  WeightsPtr w(new (std::nothrow) Weights());
  if (!w) {
    return Status::kOutOfMemory;
  }
  w->method = Method::kMatMul;
  w->table = ChosenTable(isa);
  w->geometry = {outputs, inputs, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {0, 0}};
  w->outputs = outputs;
  w->inputs = inputs;
  w->runs[0] = w->runs[1] = 1;
  w->run_elements = inputs;
  w->group_outputs = outputs;
  SetLevels(codes, w.get());
  if (!SetSizes(w.get())) {
    return Status::kBadShape;
  }
  Status status = SetCodeSums(codes, w.get());
  if (status == Status::kOk) {
    status = w->table->gemv_rows > 0 ? Pack(codes, w.get()) : Decode(codes, w.get());
  }
  if (status == Status::kOk) {
    *out = std::move(w);
  }
  return status;
}

Status PrepareConv(const Codes& codes, const ConvGeometry& geometry, const Isa* isa, WeightsPtr* out) {
  std::int64_t inputs = 0;
  std::int64_t count = 0;
  if (!Valid(geometry) || !Multiply(geometry.kernel[0], geometry.kernel[1], &inputs) ||
      !Multiply(inputs, geometry.in_channels / geometry.group, &inputs) ||
      !Multiply(inputs, geometry.out_channels, &count) || inputs > kMostInputs ||
      geometry.out_channels > kMostInputs) {
    return Status::kBadShape;
  }
  WeightsPtr w(new (std::nothrow) Weights());
  if (!w) {
    return Status::kOutOfMemory;
  }
  const std::int64_t channels = geometry.in_channels / geometry.group;
  w->table = ChosenTable(isa);
  w->geometry = geometry;
  w->outputs = geometry.out_channels;
  w->inputs = inputs;
  w->group_outputs = geometry.out_channels / geometry.group;
  w->method = channels == 1 && w->group_outputs <= kDepthwiseOutputs ? Method::kDepthwise : Method::kConv;
  const bool few = inputs <= w->table->planar_inputs || inputs * w->group_outputs <= w->table->planar_weights;
  if (w->method == Method::kConv && w->table->planar != nullptr && few && geometry.stride[0] == 1 &&
      geometry.stride[1] == 1 && geometry.kernel[1] <= kMostPlanarCopies && channels >= kPlanarChannels - 1) {
    w->method = Method::kPlanar;
  }
  // Without dilation neighbouring taps of a kernel row are neighbours in memory.
  const bool joined = geometry.dilation[1] == 1 || geometry.kernel[1] == 1;
  w->runs[0] = geometry.kernel[0];
  w->runs[1] = joined ? 1 : geometry.kernel[1];
  w->run_elements = joined ? geometry.kernel[1] * channels : channels;
  SetLevels(codes, w.get());
  if (!SetSizes(w.get())) {
    return Status::kBadShape;
  }
  Status status = SetCodeSums(codes, w.get());
  if (status == Status::kOk) {
    status = w->method == Method::kDepthwise ? SetTaps(codes, w.get()) : Decode(codes, w.get());
  }
  if (status == Status::kOk) {
    *out = std::move(w);
  }
  return status;
}

Status PrepareRequantizer(const Weights& w, const Numbers& numbers, RequantizerPtr* out) {
  RequantizerPtr r(new (std::nothrow) Requantizer());
  if (!r) {
    return Status::kOutOfMemory;
  }
  const bool depthwise = w.method == Method::kDepthwise;
  const std::int64_t width = w.Width();
  const std::int64_t places = depthwise ? w.outputs : w.geometry.group * w.group_panels * width;
  r->start = AllocateZeros(places * static_cast<std::int64_t>(sizeof(std::int32_t)));
  r->factor = AllocateZeros(places * static_cast<std::int64_t>(sizeof(float)));
  if (!r->start || !r->factor) {
    return Status::kOutOfMemory;
  }
  const bool floats = numbers.float_bias != nullptr;
  if (floats) {
    if (w.method != Method::kMatMul) {
      return Status::kBadShape;
    }
    r->bias = AllocateZeros(places * static_cast<std::int64_t>(sizeof(float)));
    if (!r->bias) {
      return Status::kOutOfMemory;
    }
  }
  r->numbers = {numbers.y_zero_point, numbers.y_signed ? -128 : 0, numbers.y_signed ? 127 : 255};
  const bool stored_signed = w.table->activation == Activation::kSigned;
  r->x_flip = numbers.x_signed != stored_signed ? 0x80 : 0;
  r->x_zero_point = numbers.x_zero_point + (r->x_flip == 0 ? 0 : (stored_signed ? -128 : 128));
  const bool centered = w.table->activation == Activation::kCentered;
  for (std::int64_t m = 0; m < w.outputs; ++m) {
    const std::int64_t inside = m % w.group_outputs;
    const std::int64_t panel = m / w.group_outputs * w.group_panels + inside / width;
    const std::int64_t at = depthwise ? m : panel * width + inside % width;
    // Sums wrap around.
    const std::uint32_t shift =
        centered ? 0U : static_cast<std::uint32_t>(r->x_zero_point) * static_cast<std::uint32_t>(w.CodeSums()[m]);
    const std::uint32_t bias = floats ? 0U : static_cast<std::uint32_t>(numbers.bias[m]);
    r->Start()[at] = static_cast<std::int32_t>(bias - shift);
    const float product = numbers.x_scale * numbers.w_scale[m];
    r->Factor()[at] = floats ? product : product / numbers.y_scale;
    if (floats) {
      r->Bias()[at] = numbers.float_bias[m];
    }
    if (!std::isfinite(r->Factor()[at])) {
      return Status::kBadNumbers;
    }
  }
  *out = std::move(r);
  return Status::kOk;
}

}  // namespace postquant::lut
