// AdaptiveQuantize and AdaptiveRequantize: every sample is quantized with a step computed from its own statistics.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "adaptive_step.h"
#include "operators.h"
#include "workspace.h"

namespace postquant {
namespace {

using quantize::Kernels;
using quantize::Moments;

constexpr std::size_t kTaskElements = 16384;  // about what is worth handing to another thread

// `T` is float for AdaptiveQuantize, uint8 for AdaptiveRequantize, which has x_scale and x_zero_point before `step`.
template <typename T>
class Adaptive {
 public:
  static constexpr bool kFromCodes = std::is_same_v<T, std::uint8_t>;
  static constexpr std::size_t kXScale = 1;
  static constexpr std::size_t kXZeroPoint = 2;
  static constexpr std::size_t kNetwork = kFromCodes ? 3 : 1;

  static const Signature& GetSignature() {
    static const Signature signature = MakeSignature();
    return signature;
  }

  explicit Adaptive(const NodeInfo& info)
      : identity_(info.identity()), step_(info, kNetwork), inputs_(info, 1), kernels_(quantize::SelectedKernels()) {
    if (inputs_.all_constant()) {
      Validate(inputs_.constants());
    }
  }

  const Identity& identity() const { return identity_; }

  void Compute(const Run& run) const {
    const Tensor x = run.Input(0);
    const std::size_t rank = x.shape.rank();
    if (rank < 2 || x.shape.Count(1, rank) == 0) {
      identity_.FailInput(0, "has shape " + x.shape.Text() + ", expected samples, channels and no size of 0");
    }
    const Tensors inputs = inputs_.Read(run);
    if (!inputs_.all_constant()) {
      Validate(inputs);
    }
    step_.ValidateChannels(identity_, inputs, x.shape[1]);
    const auto samples = static_cast<std::size_t>(x.shape[0]);
    std::uint8_t* const codes = run.Output<std::uint8_t>(0, x.shape);
    float* const steps = run.Output<float>(1, {x.shape[0]});
    if (samples == 0 || codes == nullptr) {
      return;
    }
    const auto channels = static_cast<std::size_t>(x.shape[1]);
    const std::size_t points = x.shape.Count(2, rank);
    const T* const data = x.As<T>();
    // Moments of all channels, then the step of each sample.
    Workspace workspace(samples * channels * sizeof(Moments) + samples * sizeof(float));
    auto* const moments = static_cast<Moments*>(workspace.data());
    auto* const own_steps = static_cast<float*>(static_cast<void*>(moments + samples * channels));
    Pool(run, inputs, data, samples * channels, points, moments);
    std::vector<double> scratch;
    const double unit = kFromCodes ? static_cast<double>(*inputs[kXScale].template As<float>()) : 1.0;
    for (std::size_t n = 0; n < samples; ++n) {
      own_steps[n] = step_.Step(inputs, moments + n * channels, channels, points, unit, &scratch);
      if (steps != nullptr) {
        steps[n] = own_steps[n];
      }
    }
    Quantize(run, inputs, data, samples, channels * points, own_steps, codes);
  }

  static void InferShapes(const ShapeInference& inference) {
    std::vector<Axis> axes;
    if (inference.Input(0, &axes) && axes.size() >= 2) {
      inference.SetOutput(0, abi::kUint8, axes);
      inference.SetOutput(1, abi::kFloat, {axes[0]});
    }
  }

 private:
  static Signature MakeSignature() {
    Signature signature = {kFromCodes ? "AdaptiveRequantize" : "AdaptiveQuantize",
                           {{"x", ElementTypeOf<T>::kValue}},
                           {{"codes", abi::kUint8}, {"step_out", abi::kFloat}}};
    if (kFromCodes) {
      signature.inputs.push_back({"x_scale", abi::kFloat});
      signature.inputs.push_back({"x_zero_point", abi::kUint8});
    }
    for (const Port& port : {Port{"step", abi::kFloat}, Port{"zero_point", abi::kUint8}, Port{"w1", abi::kFloat},
                             Port{"b1", abi::kFloat}, Port{"w2", abi::kFloat}, Port{"b2", abi::kFloat}}) {
      signature.inputs.push_back(port);
    }
    return signature;
  }

  void Validate(const Tensors& inputs) const {
    if (kFromCodes) {
      identity_.ExpectShape(inputs[kXScale], kXScale, {});
      identity_.ExpectScales(inputs[kXScale], kXScale);
      identity_.ExpectShape(inputs[kXZeroPoint], kXZeroPoint, {});
    }
    step_.Validate(identity_, inputs);
  }

  void Pool(const Run& run, const Tensors& inputs, const T* x, std::size_t planes, std::size_t points,
            Moments* moments) const {
    const std::size_t group = std::max<std::size_t>(1, kTaskElements / points);
    const std::size_t tasks = (planes + group - 1) / group;
    const std::int32_t zero_point = kFromCodes ? *inputs[kXZeroPoint].template As<std::uint8_t>() : 0;
    run.ParallelFor(tasks, [&](std::size_t task) noexcept {
      const std::size_t end = std::min(planes, (task + 1) * group);
      for (std::size_t plane = task * group; plane < end; ++plane) {
        if constexpr (kFromCodes) {
          kernels_.pool_codes(x + plane * points, points, zero_point, moments + plane);
        } else {
          kernels_.pool_float(x + plane * points, points, step_.wants_squares(), step_.wants_largest(),
                              moments + plane);
        }
      }
    });
  }

  void Quantize(const Run& run, const Tensors& inputs, const T* x, std::size_t samples, std::size_t elements,
                const float* steps, std::uint8_t* codes) const {
    const std::size_t parts = (elements + kTaskElements - 1) / kTaskElements;
    const quantize::CodeRange range = step_.Range(inputs);
    const float x_scale = kFromCodes ? *inputs[kXScale].template As<float>() : 1.0F;
    const std::int32_t zero_point = kFromCodes ? *inputs[kXZeroPoint].template As<std::uint8_t>() : 0;
    run.ParallelFor(samples * parts, [&](std::size_t task) noexcept {
      const std::size_t sample = task / parts;
      const std::size_t begin = sample * elements + task % parts * kTaskElements;
      const std::size_t count = std::min(kTaskElements, (sample + 1) * elements - begin);
      if constexpr (kFromCodes) {
        kernels_.requantize(x + begin, count, x_scale, zero_point, steps[sample], range, codes + begin);
      } else {
        kernels_.quantize(x + begin, count, steps[sample], range, codes + begin);
      }
    });
  }

  Identity identity_;
  AdaptiveStep step_;
  SideInputs inputs_;
  const Kernels& kernels_;
};

}  // namespace

void AddAdaptiveQuantize(const OrtApi* api, OperatorList* list) {
  list->push_back(std::make_shared<CustomOp<Adaptive<float>>>(api));
}

void AddAdaptiveRequantize(const OrtApi* api, OperatorList* list) {
  list->push_back(std::make_shared<CustomOp<Adaptive<std::uint8_t>>>(api));
}

}  // namespace postquant
