// LutRequantize: codes of 8 bits become the nearest ones of the few levels of all channels or of each.
//
// A channel's codes have 256 values, so all arithmetic is done once for each of them, by the law.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "operators.h"
#include "quantize_kernels.h"
#include "side_inputs.h"
#include "workspace.h"

namespace postquant {
namespace {

using quantize::LevelMap;

constexpr std::size_t kTaskElements = 16384;  // about what is worth handing to another thread
constexpr std::size_t kCodes = 256;
constexpr std::int64_t kFewestLevels = 2;
constexpr std::int64_t kMostLevels = quantize::kMostSteps + 1;

enum Input : std::size_t { kX, kXScale, kXZeroPoint, kScale, kZeroPoint, kTable };

// The nearest level of every code, the upper one of two that are equally near, and the steps between them.
void MakeMap(const std::uint8_t* levels, std::size_t count, const std::uint8_t* codes, LevelMap* map) {
  std::size_t nearest = 0;
  std::size_t steps = 0;
  for (std::size_t i = 0; i < kCodes; ++i) {
    while (nearest + 1 < count && levels[nearest] + levels[nearest + 1] <= 2 * codes[i]) {
      ++nearest;
    }
    map->level[i] = levels[nearest];
    if (i > 0 && map->level[i] != map->level[i - 1]) {
      map->below[steps] = static_cast<std::int8_t>(static_cast<std::int32_t>(i) - 1 - 128);
      map->above[steps] = map->level[i];
      ++steps;
    }
  }
  map->steps = static_cast<std::uint8_t>(steps);
  std::fill(map->below + steps, map->below + quantize::kMostSteps, std::int8_t{127});
  std::fill(map->above + steps, map->above + quantize::kMostSteps, map->level[kCodes - 1]);
}

class LutRequantize {
 public:
  static const Signature& GetSignature() {
    static const Signature signature = {"LutRequantize",
                                        {{"x", abi::kUint8},
                                         {"x_scale", abi::kFloat},
                                         {"x_zero_point", abi::kUint8},
                                         {"scale", abi::kFloat},
                                         {"zero_point", abi::kUint8},
                                         {"table", abi::kUint8}},
                                        {{"y", abi::kUint8}}};
    return signature;
  }

  explicit LutRequantize(const NodeInfo& info)
      : identity_(info.identity()),
        behind_(static_cast<std::size_t>(-1 - info.Int("axis", -static_cast<std::int64_t>(Shape::kMaxRank), -1))),
        inputs_(info, kXScale),
        kernels_(quantize::SelectedKernels()) {
    if (inputs_.all_constant()) {
      Validate(inputs_.constants());
      maps_.resize(Channels(inputs_.constants()));
      MakeMaps(inputs_.constants(), maps_.data());
    }
  }

  const Identity& identity() const { return identity_; }

  void Compute(const Run& run) const {
    const Tensor x = run.Input(kX);
    if (inputs_.all_constant()) {
      Requantize(run, x, maps_.size(), maps_.data());
      return;
    }
    const Tensors inputs = inputs_.Read(run);
    Validate(inputs);
    const std::size_t channels = Channels(inputs);
    const Workspace workspace(channels * sizeof(LevelMap));
    auto* const maps = static_cast<LevelMap*>(workspace.data());
    MakeMaps(inputs, maps);
    Requantize(run, x, channels, maps);
  }

  static void InferShapes(const ShapeInference& inference) {
    std::vector<Axis> axes;
    if (inference.Input(kX, &axes)) {
      inference.SetOutput(0, abi::kUint8, axes);
    }
  }

 private:
  static std::size_t Channels(const Tensors& inputs) { return static_cast<std::size_t>(inputs[kTable].shape[0]); }

  void Validate(const Tensors& inputs) const {
    for (const Input input : {kXScale, kXZeroPoint, kScale, kZeroPoint}) {
      identity_.ExpectShape(inputs[input], input, {});
    }
    identity_.ExpectScales(inputs[kXScale], kXScale);
    identity_.ExpectScales(inputs[kScale], kScale);
    const Shape& shape = inputs[kTable].shape;
    if (shape.rank() != 2 || shape[0] < 1 || shape[1] < kFewestLevels || shape[1] > kMostLevels) {
      identity_.FailInput(kTable, "has shape " + shape.Text() + ", expected at least 1 row of " +
                                      std::to_string(kFewestLevels) + " to " + std::to_string(kMostLevels) +
                                      " levels");
    }
    const auto* const levels = inputs[kTable].As<std::uint8_t>();
    const auto count = static_cast<std::size_t>(shape[1]);
    for (std::size_t row = 0; row < Channels(inputs); ++row) {
      if (!std::is_sorted(levels + row * count, levels + (row + 1) * count)) {
        identity_.FailInput(kTable, "has levels that are not sorted in row " + std::to_string(row));
      }
    }
  }

  void MakeMaps(const Tensors& inputs, LevelMap* maps) const {
    std::uint8_t all[kCodes];
    std::uint8_t codes[kCodes];
    for (std::size_t i = 0; i < kCodes; ++i) {
      all[i] = static_cast<std::uint8_t>(i);
    }
    kernels_.requantize(all, kCodes, *inputs[kXScale].As<float>(), *inputs[kXZeroPoint].As<std::uint8_t>(),
                        *inputs[kScale].As<float>(), {*inputs[kZeroPoint].As<std::uint8_t>(), 0, 255}, codes);
    const auto* const levels = inputs[kTable].As<std::uint8_t>();
    const auto count = static_cast<std::size_t>(inputs[kTable].shape[1]);
    for (std::size_t channel = 0; channel < Channels(inputs); ++channel) {
      MakeMap(levels + channel * count, count, codes, maps + channel);
    }
  }

  void Requantize(const Run& run, const Tensor& x, std::size_t channels, const LevelMap* maps) const {
    const std::size_t rank = x.shape.rank();
    const bool fits = behind_ < rank && static_cast<std::size_t>(x.shape[rank - 1 - behind_]) == channels;
    if (rank == 0 || (channels != 1 && !fits)) {
      identity_.FailInput(kX, "has shape " + x.shape.Text() + ", expected " +
                                  (rank == 0 ? "one axis or more"
                                             : std::to_string(channels) + " channels on axis -" +
                                                   std::to_string(behind_ + 1)));
    }
    std::uint8_t* const y = run.Output<std::uint8_t>(0, x.shape);
    if (x.count == 0 || y == nullptr) {
      return;
    }
    const std::size_t points = channels == 1 ? x.count : x.shape.Count(rank - behind_, rank);
    const auto* const codes = x.As<std::uint8_t>();
    run.ParallelFor((x.count + kTaskElements - 1) / kTaskElements, [&](std::size_t task) noexcept {
      const std::size_t end = std::min(x.count, (task + 1) * kTaskElements);
      std::size_t begin = task * kTaskElements;
      std::size_t plane_end = (begin / points + 1) * points;
      std::size_t channel = begin / points % channels;
      for (; begin < end; plane_end += points) {
        const std::size_t stop = std::min(end, plane_end);
        const LevelMap& map = maps[channel];
        if (points < quantize::kFewestPoints) {
          for (; begin < stop; ++begin) {
            y[begin] = map.level[codes[begin]];
          }
        } else {
          kernels_.levels(codes + begin, stop - begin, map, y + begin);
          begin = stop;
        }
        channel = channel + 1 == channels ? 0 : channel + 1;
      }
    });
  }

  Identity identity_;
  std::size_t behind_;  // axes behind that of the channels
  SideInputs inputs_;
  const quantize::Kernels& kernels_;
  std::vector<LevelMap> maps_;  // if all side inputs are constants
};

}  // namespace

void AddLutRequantize(const OrtApi* api, OperatorList* list) {
  list->push_back(std::make_shared<CustomOp<LutRequantize>>(api));
}

}  // namespace postquant
