// BorderQuantize: a value is rounded up if its fraction is above a border that sees the value and its neighbours.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include "border_coefficients.h"
#include "border_strip.h"
#include "operators.h"
#include "quantize_kernels.h"
#include "workspace.h"

namespace postquant {
namespace {

constexpr std::size_t kTaskElements = 16384;  // about what is worth handing to another thread

bool HasNeighbours(const BorderCoefficients& coefficients) {
  return coefficients.has_window || coefficients.rank > 0;
}

class BorderQuantize {
 public:
  static const Signature& GetSignature() {
    static const Signature signature = {"BorderQuantize",
                                        {{"x", abi::kFloat},
                                         {"scale", abi::kFloat},
                                         {"zero_point", abi::kUint8},
                                         {"border", abi::kFloat},
                                         {"window", abi::kInt8},
                                         {"window_scale", abi::kFloat},
                                         {"left", abi::kInt8},
                                         {"left_scale", abi::kFloat},
                                         {"right", abi::kInt8},
                                         {"right_scale", abi::kFloat}},
                                        {{"y", abi::kUint8}}};
    return signature;
  }

  explicit BorderQuantize(const NodeInfo& info)
      : identity_(info.identity()),
        attributes_(info),
        inputs_(info, kBorderScale),
        kernels_(quantize::SelectedKernels()) {
    if (inputs_.all_constant()) {
      coefficients_ = std::make_unique<BorderCoefficients>(identity_, attributes_, inputs_.constants());
    }
  }

  const Identity& identity() const { return identity_; }

  void Compute(const Run& run) const {
    const Tensor x = run.Input(kBorderX);
    const std::size_t rank = x.shape.rank();
    if (rank < 2 || rank > 4 || x.shape[1] != attributes_.channels) {
      identity_.FailInput(kBorderX, "has shape " + x.shape.Text() + ", expected 2 to 4 axes and " +
                                        std::to_string(attributes_.channels) + " channels");
    }
    if (coefficients_ != nullptr) {
      Quantize(run, *coefficients_, x);
    } else {
      const Tensors inputs = inputs_.Read(run);
      Quantize(run, BorderCoefficients(identity_, attributes_, inputs), x);
    }
  }

  static void InferShapes(const ShapeInference& inference) {
    std::vector<Axis> axes;
    if (inference.Input(kBorderX, &axes)) {
      inference.SetOutput(0, abi::kUint8, axes);
    }
  }

 private:
  void Quantize(const Run& run, const BorderCoefficients& coefficients, const Tensor& x) const {
    std::uint8_t* const y = run.Output<std::uint8_t>(0, x.shape);
    if (x.count == 0 || y == nullptr) {
      return;
    }
    const std::size_t rank = x.shape.rank();
    const auto samples = static_cast<std::size_t>(x.shape[0]);
    const std::size_t height = rank == 4 ? static_cast<std::size_t>(x.shape[2]) : 1;
    const std::size_t width = rank >= 3 ? static_cast<std::size_t>(x.shape[rank - 1]) : 1;
    if (HasNeighbours(coefficients)) {
      WithNeighbours(run, coefficients, samples, height, width, x.As<float>(), y);
    } else {
      Alone(run, coefficients, samples, height * width, x.As<float>(), y);
    }
  }

  // Every value for itself.
  void Alone(const Run& run, const BorderCoefficients& coefficients, std::size_t samples, std::size_t points,
             const float* x, std::uint8_t* y) const {
    const std::size_t planes = samples * coefficients.channels;
    const std::size_t group = std::max<std::size_t>(1, kTaskElements / points);
    run.ParallelFor((planes + group - 1) / group, [&](std::size_t task) noexcept {
      const std::size_t end = std::min(planes, (task + 1) * group);
      for (std::size_t plane = task * group; plane < end; ++plane) {
        kernels_.border(x + plane * points, points, coefficients.scale, coefficients.range,
                        coefficients.Channel(plane % coefficients.channels), y + plane * points);
      }
    });
  }

  void WithNeighbours(const Run& run, const BorderCoefficients& coefficients, std::size_t samples, std::size_t height,
                      std::size_t width, const float* x, std::uint8_t* y) const {
    const StripPlan plan(coefficients, height, width);
    const std::size_t image = coefficients.channels * height * width;
    const std::size_t units = coefficients.channels / plan.channels;  // strips of equal rows in one image
    const std::size_t items = samples * units * plan.strips;
    const std::size_t group = std::max<std::size_t>(1, kTaskElements / (plan.channels * plan.rows * width));
    std::atomic<bool> no_memory{false};
    run.ParallelFor((items + group - 1) / group, [&](std::size_t task) noexcept {
      try {
        const Workspace workspace(plan.scratch);
        const std::size_t end = std::min(items, (task + 1) * group);
        for (std::size_t item = task * group; item < end; ++item) {
          const std::size_t sample = item / (units * plan.strips);
          const std::size_t channel = item / plan.strips % units;
          QuantizeStrip(coefficients, plan, kernels_, channel, item % plan.strips, x + sample * image,
                        y + sample * image, workspace.data());
        }
      } catch (const std::bad_alloc&) {
        no_memory = true;
      }
    });
    if (no_memory) {
      throw std::bad_alloc();
    }
  }

  Identity identity_;
  BorderAttributes attributes_;
  SideInputs inputs_;
  const quantize::Kernels& kernels_;
  std::unique_ptr<const BorderCoefficients> coefficients_;  // if all are constants
};

}  // namespace

void AddBorderQuantize(const OrtApi* api, OperatorList* list) {
  list->push_back(std::make_shared<CustomOp<BorderQuantize>>(api));
}

}  // namespace postquant
