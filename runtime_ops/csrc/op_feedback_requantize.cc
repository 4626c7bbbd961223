// FeedbackRequantize: codes of 8 bits become levels, groups of channels in turn, each of which makes up for the errors
// of those before it at the same position, which is a place or a square of places.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "feedback_coefficients.h"
#include "feedback_tile.h"
#include "level_maps.h"
#include "operators.h"
#include "quantize_kernels.h"
#include "scratch.h"
#include "side_inputs.h"
#include "workspace.h"

namespace postquant {
namespace {

using quantize::FeedbackPlan;
using quantize::FeedbackScratch;
using quantize::kTilePositions;

constexpr std::size_t kTaskElements = 8192;  // about what is worth handing to another thread

constexpr std::int64_t kCellAxis = -3;       // of the channels: rows and columns are behind it

std::size_t ScratchBytes(const FeedbackPlan& plan, std::size_t largest_group, bool rows) {
  return Scratch::kLine + Scratch::Bytes<std::int32_t>(plan.rank * kTilePositions) +
         Scratch::Bytes<std::int16_t>(quantize::Even(plan.rank) * kTilePositions) +
         Scratch::Bytes<std::int16_t>(largest_group * kTilePositions) +
         (rows ? Scratch::Bytes<std::uint8_t>(plan.channels * kTilePositions) : 0);
}

FeedbackScratch Cut(const FeedbackPlan& plan, std::size_t largest_group, bool rows, void* memory) {
  Scratch scratch(memory);
  FeedbackScratch cut{};
  cut.sums = scratch.Take<std::int32_t>(plan.rank * kTilePositions);
  cut.inner = scratch.Take<std::int16_t>(quantize::Even(plan.rank) * kTilePositions);
  cut.errors = scratch.Take<std::int16_t>(largest_group * kTilePositions);
  if (rows) {
    cut.rows = scratch.Take<std::uint8_t>(plan.channels * kTilePositions);
    // What is beyond the positions of a tile is read, whatever it is.
    std::fill(cut.rows, cut.rows + plan.channels * kTilePositions, std::uint8_t{0});
  }
  return cut;
}

class FeedbackRequantize {
 public:
  static const Signature& GetSignature() {
    static const Signature signature = {"FeedbackRequantize",
                                        {{"x", abi::kUint8},
                                         {"x_scale", abi::kFloat},
                                         {"x_zero_point", abi::kUint8},
                                         {"scale", abi::kFloat},
                                         {"zero_point", abi::kUint8},
                                         {"table", abi::kUint8},
                                         {"group", abi::kUint8},
                                         {"left", abi::kInt8},
                                         {"left_scale", abi::kFloat},
                                         {"right", abi::kInt8},
                                         {"right_scale", abi::kFloat}},
                                        {{"y", abi::kUint8}}};
    return signature;
  }

  explicit FeedbackRequantize(const NodeInfo& info)
      : identity_(info.identity()),
        behind_(static_cast<std::size_t>(-1 - info.Int("axis", -static_cast<std::int64_t>(Shape::kMaxRank), -1))),
        cell_(static_cast<std::size_t>(info.IntOr(1, "cell", 1, quantize::kLargestCell))),
        inputs_(info, kLevelXScale),
        kernels_(quantize::SelectedKernels()) {
    if (cell_ > 1 && behind_ != static_cast<std::size_t>(-1 - kCellAxis)) {
      identity_.Fail("attribute 'axis' is " + std::to_string(-1 - static_cast<std::int64_t>(behind_)) + ", expected " +
                     std::to_string(kCellAxis) + " for cells of " + std::to_string(cell_) + ".");
    }
    if (inputs_.all_constant()) {
      coefficients_ = std::make_unique<FeedbackCoefficients>(identity_, kernels_, cell_, inputs_.constants());
    }
  }

  const Identity& identity() const { return identity_; }

  void Compute(const Run& run) const {
    const Tensor x = run.Input(kLevelX);
    if (coefficients_ != nullptr) {
      Requantize(run, *coefficients_, x);
    } else {
      const Tensors inputs = inputs_.Read(run);
      Requantize(run, FeedbackCoefficients(identity_, kernels_, cell_, inputs), x);
    }
  }

  static void InferShapes(const ShapeInference& inference) {
    std::vector<Axis> axes;
    if (inference.Input(kLevelX, &axes)) {
      inference.SetOutput(0, abi::kUint8, axes);
    }
  }

 private:
  // Every task has some tiles of consecutive positions, whatever samples they belong to.
  void Requantize(const Run& run, const FeedbackCoefficients& coefficients, const Tensor& x) const {
    const FeedbackPlan& plan = coefficients.plan();
    CheckChannels(identity_, x, plan.channels / (cell_ * cell_), behind_);
    std::uint8_t* const y = run.Output<std::uint8_t>(0, x.shape);
    if (x.count == 0 || y == nullptr) {
      return;
    }
    if (cell_ == 1) {
      const std::size_t inner = x.shape.Count(x.shape.rank() - behind_, x.shape.rank());
      RunTiles(run, coefficients, x, y, x.count / plan.channels, inner == 1, [&](std::size_t begin, std::size_t end) {
        return quantize::TileOf(begin, end, plan.channels, inner);
      });
      return;
    }
    const quantize::CellPlanes planes{cell_, plan.channels / (cell_ * cell_),
                                      static_cast<std::size_t>(x.shape[x.shape.rank() - 2]),
                                      static_cast<std::size_t>(x.shape[x.shape.rank() - 1])};
    const std::size_t cells = x.shape.Count(0, x.shape.rank() - 3) * planes.Rows() * planes.Columns();
    RunTiles(run, coefficients, x, y, cells, true,
             [&](std::size_t begin, std::size_t end) { return quantize::TileOf(begin, end, planes); });
  }

  // `rows`: whether the kernel needs memory for the rows of all channels.
  template <typename TileOf>
  void RunTiles(const Run& run, const FeedbackCoefficients& coefficients, const Tensor& x, std::uint8_t* y,
                std::size_t positions, bool rows, const TileOf& tile_of) const {
    const FeedbackPlan& plan = coefficients.plan();
    const auto* const codes = x.As<std::uint8_t>();
    const std::size_t group =
        std::max<std::size_t>(1, kTaskElements / (plan.channels * kTilePositions)) * kTilePositions;
    std::atomic<bool> no_memory{false};
    run.ParallelFor((positions + group - 1) / group, [&](std::size_t task) noexcept {
      try {
        const std::size_t largest = coefficients.largest_group();
        const Workspace workspace(ScratchBytes(plan, largest, rows));
        const FeedbackScratch scratch = Cut(plan, largest, rows, workspace.data());
        const std::size_t end = std::min(positions, (task + 1) * group);
        for (std::size_t begin = task * group; begin < end; begin += kTilePositions) {
          const std::size_t stop = std::min(end, begin + kTilePositions);
          kernels_.feedback(plan, tile_of(begin, stop), scratch, codes, y);
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
  std::size_t behind_;  // axes behind that of the channels
  std::size_t cell_;
  SideInputs inputs_;
  const quantize::Kernels& kernels_;
  std::unique_ptr<const FeedbackCoefficients> coefficients_;  // if all side inputs are constants
};

}  // namespace

void AddFeedbackRequantize(const OrtApi* api, OperatorList* list) {
  list->push_back(std::make_shared<CustomOp<FeedbackRequantize>>(api));
}

}  // namespace postquant
