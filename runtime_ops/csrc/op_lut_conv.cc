// LutQLinearConv: a convolution over one or two spatial axes whose weight is packed codes and a table.
#include <cstdint>
#include <limits>
#include <string>

#include "lut_layer.h"
#include "operators.h"

namespace postquant {
namespace {

constexpr std::int64_t kMostSize = std::numeric_limits<std::int32_t>::max();

struct Geometry {
  lut::ConvGeometry of_kernel{};
  std::size_t spatial = 2;
  std::int64_t terms = 1;  // C / group * kernel

  // Where spatial axis `axis` of the graph stands in the arrays of two: the first is absent in one dimension.
  std::size_t slot(std::size_t axis) const { return axis + 2 - spatial; }
};

Geometry ReadGeometry(const NodeInfo& info) {
  const std::vector<std::int64_t> w_shape = info.Ints("w_shape", 1, kMostSize);
  if (w_shape.size() != 3 && w_shape.size() != 4) {
    info.identity().Fail("attribute 'w_shape' is " + Text(w_shape) + ", expected 3 or 4 numbers.");
  }
  Geometry geometry;
  geometry.spatial = w_shape.size() - 2;
  Shape row;
  row.resize(w_shape.size());
  for (std::size_t axis = 0; axis < w_shape.size(); ++axis) {
    row.set(axis, w_shape[axis]);
  }
  row.Count();  // refuses what overflows
  geometry.terms = static_cast<std::int64_t>(row.Count(1, row.rank()));
  const std::size_t spatial = geometry.spatial;
  const std::vector<std::int64_t> strides = info.Ints("strides", spatial, 1, kMostSize);
  const std::vector<std::int64_t> dilations = info.Ints("dilations", spatial, 1, kMostSize);
  const std::vector<std::int64_t> pads = info.Ints("pads", 2 * spatial, 0, kMostSize);
  lut::ConvGeometry& g = geometry.of_kernel;
  g.group = info.Int("group", 1, kMostSize);
  g.out_channels = w_shape[0];
  g.in_channels = w_shape[1] * g.group;
  if (w_shape[0] % g.group != 0 || g.in_channels > kMostSize) {
    info.identity().Fail("attribute 'group' is " + std::to_string(g.group) + ", which does not fit 'w_shape' " +
                         Text(w_shape) + ".");
  }
  for (std::size_t i = 0; i < 2; ++i) {
    g.kernel[i] = g.stride[i] = g.dilation[i] = 1;
    g.pad_begin[i] = g.pad_end[i] = 0;
  }
  for (std::size_t axis = 0; axis < spatial; ++axis) {
    const std::size_t slot = geometry.slot(axis);
    g.kernel[slot] = w_shape[2 + axis];
    g.stride[slot] = strides[axis];
    g.dilation[slot] = dilations[axis];
    g.pad_begin[slot] = pads[axis];
    g.pad_end[slot] = pads[spatial + axis];
  }
  return geometry;
}

template <typename T>
class LutQLinearConv {
 public:
  static const Signature& GetSignature() {
    static const Signature signature = LutSignature<T, T>("LutQLinearConv", "x");
    return signature;
  }

  explicit LutQLinearConv(const NodeInfo& info)
      : geometry_(ReadGeometry(info)),
        layer_(info, LutBits(info), geometry_.of_kernel.out_channels, geometry_.terms,
               [geometry = geometry_.of_kernel](const lut::Codes& codes, lut::WeightsPtr* out) {
                 return lut::PrepareConv(codes, geometry, nullptr, out);
               }) {}

  const Identity& identity() const { return layer_.identity(); }

  void Compute(const Run& run) {
    const Tensor x = run.Input(kX);
    if (x.shape.rank() != geometry_.spatial + 2 || x.shape[1] != geometry_.of_kernel.in_channels) {
      identity().FailInput(kX, "has shape " + x.shape.Text() + ", expected " + std::to_string(geometry_.spatial + 2) +
                                   " axes and " + std::to_string(geometry_.of_kernel.in_channels) + " channels");
    }
    const LutLayer::Ready ready = layer_.Acquire(run);
    const bool plane = geometry_.spatial == 2;
    lut::Plan plan{};
    layer_.Check(lut::PlanConv(*ready.weights, *ready.requantizer, x.shape[0], plane ? x.shape[2] : 1,
                               x.shape[x.shape.rank() - 1], &plan),
                 x.shape);
    Shape out = x.shape;
    out.set(1, geometry_.of_kernel.out_channels);
    for (std::size_t axis = 0; axis < geometry_.spatial; ++axis) {
      out.set(2 + axis, plan.out_size[geometry_.slot(axis)]);
    }
    T* const y = run.Output<T>(0, out);
    if (out.Count() != 0 && y != nullptr) {
      // Of an input without elements only the padding is seen: nothing is read, but addresses are computed.
      static constexpr std::uint8_t kNothing[64] = {};
      layer_.Execute(run, ready, plan, x.data != nullptr ? x.data : kNothing, y);
    }
  }

  static void InferShapes(const ShapeInference& inference) {
    std::vector<Axis> axes;
    std::vector<std::int64_t> w;
    std::vector<std::int64_t> strides;
    std::vector<std::int64_t> dilations;
    std::vector<std::int64_t> pads;
    if (!inference.Input(kX, &axes) || !inference.Ints("w_shape", &w) || !inference.Ints("strides", &strides) ||
        !inference.Ints("dilations", &dilations) || !inference.Ints("pads", &pads) || w.size() != axes.size() ||
        w.size() < 3 || strides.size() != w.size() - 2 || dilations.size() != strides.size() ||
        pads.size() != 2 * strides.size()) {
      return;
    }
    axes[1] = {w[0], ""};
    for (std::size_t i = 0; i < strides.size(); ++i) {
      const std::int64_t end = pads[strides.size() + i];
      axes[2 + i] = {OutputSize(axes[2 + i].size, w[2 + i], strides[i], dilations[i], pads[i], end), ""};
    }
    inference.SetOutput(0, inference.Type(kX), axes);
  }

 private:
  // -1 if it is unknown or the numbers are not usable.
  static std::int64_t OutputSize(std::int64_t size, std::int64_t kernel, std::int64_t stride, std::int64_t dilation,
                                 std::int64_t begin, std::int64_t end) {
    for (const std::int64_t value : {kernel, stride, dilation}) {
      if (value < 1 || value > kMostSize) {
        return -1;
      }
    }
    for (const std::int64_t value : {size, begin, end}) {
      if (value < 0 || value > kMostSize) {
        return -1;
      }
    }
    const std::int64_t free = size + begin + end - (kernel - 1) * dilation - 1;
    return free < 0 ? -1 : free / stride + 1;
  }

  Geometry geometry_;
  LutLayer layer_;
};

}  // namespace

void AddLutQLinearConv(const OrtApi* api, OperatorList* list) {
  list->push_back(std::make_shared<CustomOp<LutQLinearConv<std::uint8_t>>>(api));
  list->push_back(std::make_shared<CustomOp<LutQLinearConv<std::int8_t>>>(api));
}

}  // namespace postquant
