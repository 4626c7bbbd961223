// LutQLinearMatMul: y[..., n] = requantized sum over k of (a[..., k] - a_zero_point) * table[code[n, k]], plus bias.
#include <cstdint>
#include <limits>

#include "lut_layer.h"
#include "operators.h"

namespace postquant {
namespace {

constexpr std::int64_t kMostSize = std::numeric_limits<std::int32_t>::max();

template <typename T>
class LutQLinearMatMul {
 public:
  static const Signature& GetSignature() {
    static const Signature signature = LutSignature<T>("LutQLinearMatMul", "a");
    return signature;
  }

  explicit LutQLinearMatMul(const NodeInfo& info) : LutQLinearMatMul(info, info.Ints("w_shape", 2, 1, kMostSize)) {}

  const Identity& identity() const { return layer_.identity(); }

  void Compute(const Run& run) {
    const Tensor a = run.Input(kX);
    const std::size_t rank = a.shape.rank();
    if (rank == 0 || a.shape[rank - 1] != inputs_) {
      identity().FailInput(kX, "has shape " + a.shape.Text() + ", expected " + std::to_string(inputs_) +
                                   " as its last size");
    }
    const LutLayer::Ready ready = layer_.Acquire(run);
    Shape out = a.shape;
    out.set(rank - 1, outputs_);
    T* const y = run.Output<T>(0, out);
    if (a.count == 0 || y == nullptr) {
      return;
    }
    lut::Plan plan{};
    const auto rows = static_cast<std::int64_t>(a.shape.Count(0, rank - 1));
    layer_.Check(lut::PlanMatMul(*ready.weights, *ready.requantizer, rows, &plan), a.shape);
    layer_.Execute(run, ready, plan, a.data, y);
  }

  static void InferShapes(const ShapeInference& inference) {
    std::vector<Axis> axes;
    std::vector<std::int64_t> w_shape;
    if (inference.Input(kX, &axes) && inference.Ints("w_shape", &w_shape) && w_shape.size() == 2) {
      axes.back() = {w_shape[0], ""};
      inference.SetOutput(0, inference.Type(kX), axes);
    }
  }

 private:
  LutQLinearMatMul(const NodeInfo& info, const std::vector<std::int64_t>& w_shape)
      : outputs_(w_shape[0]),
        inputs_(w_shape[1]),
        layer_(info, LutBits(info), outputs_, inputs_,
               [outputs = outputs_, inputs = inputs_](const lut::Codes& codes, lut::WeightsPtr* out) {
                 return lut::PrepareMatMul(codes, outputs, inputs, nullptr, out);
               }) {}

  std::int64_t outputs_;
  std::int64_t inputs_;
  LutLayer layer_;
};

}  // namespace

void AddLutQLinearMatMul(const OrtApi* api, OperatorList* list) {
  list->push_back(std::make_shared<CustomOp<LutQLinearMatMul<std::uint8_t>>>(api));
  list->push_back(std::make_shared<CustomOp<LutQLinearMatMul<std::int8_t>>>(api));
}

}  // namespace postquant
