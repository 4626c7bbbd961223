// sum[..., n] = sum over k of (a[..., k] - a_zero_point) * table[code[n, k]]
//
//   LutQLinearMatMul         y = sum + int32 bias, requantized
//   LutMatMulIntegerToFloat  y = float(sum) * (a_scale * w_scale[n]) + float bias
#include <cstdint>
#include <limits>
#include <type_traits>

#include "lut_layer.h"
#include "operators.h"

namespace postquant {
namespace {

constexpr std::int64_t kMostSize = std::numeric_limits<std::int32_t>::max();

// `T` is the type of the activation, `Y` that of the output.
template <typename T, typename Y>
class LutMatMul {
 public:
  static const Signature& GetSignature() {
    static const Signature signature =
        LutSignature<T, Y>(kFloats ? "LutMatMulIntegerToFloat" : "LutQLinearMatMul", "a");
    return signature;
  }

  explicit LutMatMul(const NodeInfo& info) : LutMatMul(info, info.Ints("w_shape", 2, 1, kMostSize)) {}

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
    Y* const y = run.Output<Y>(0, out);
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
      inference.SetOutput(0, kFloats ? static_cast<int>(abi::kFloat) : inference.Type(kX), axes);
    }
  }

 private:
  static constexpr bool kFloats = std::is_same_v<Y, float>;

  LutMatMul(const NodeInfo& info, const std::vector<std::int64_t>& w_shape)
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
  list->push_back(std::make_shared<CustomOp<LutMatMul<std::uint8_t, std::uint8_t>>>(api));
  list->push_back(std::make_shared<CustomOp<LutMatMul<std::int8_t, std::int8_t>>>(api));
}

void AddLutMatMulIntegerToFloat(const OrtApi* api, OperatorList* list) {
  list->push_back(std::make_shared<CustomOp<LutMatMul<std::uint8_t, float>>>(api));
  list->push_back(std::make_shared<CustomOp<LutMatMul<std::int8_t, float>>>(api));
}

}  // namespace postquant
