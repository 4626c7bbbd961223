// LutRequantize: codes of 8 bits become the nearest ones of the few levels of all channels or of each.
//
// A channel's codes have 256 values, so all arithmetic is done once for each of them, by the law.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "level_maps.h"
#include "operators.h"
#include "quantize_kernels.h"
#include "side_inputs.h"
#include "workspace.h"

namespace postquant {
namespace {

using quantize::LevelMap;
using quantize::LevelRows;

constexpr std::size_t kTaskElements = 16384;  // about what is worth handing to another thread

// Memory of a channel's map, and of its numbers in LevelRows.
constexpr std::size_t kChannelBytes = sizeof(LevelMap) + 1 + 2 * quantize::kMostSteps;

// The steps of all maps, one step of all channels after the other.
LevelRows MakeRows(const LevelMap* maps, std::size_t channels, void* memory) {
  auto* const lowest = static_cast<std::uint8_t*>(memory);
  std::uint8_t* const above = lowest + channels;
  auto* const below = static_cast<std::int8_t*>(static_cast<void*>(above + quantize::kMostSteps * channels));
  std::size_t steps = 0;
  for (std::size_t channel = 0; channel < channels; ++channel) {
    const LevelMap& map = maps[channel];
    lowest[channel] = map.level[0];
    steps = std::max<std::size_t>(steps, map.steps);
    for (std::size_t s = 0; s < quantize::kMostSteps; ++s) {
      below[s * channels + channel] = map.below[s];
      above[s * channels + channel] = map.reached[s + 1];
    }
  }
  return {channels, steps, lowest, below, above};
}

// What Compute needs of all channels; the memory is somebody else's.
struct LevelTables {
  std::size_t channels = 0;
  const LevelMap* maps = nullptr;
  LevelRows rows{};  // if the channels lie on the last axis
};

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
        inputs_(info, kLevelXScale),
        kernels_(quantize::SelectedKernels()) {
    if (inputs_.all_constant()) {
      CheckLevels(identity_, inputs_.constants());
      memory_.resize(Channels(inputs_.constants()) * kChannelBytes);
      tables_ = MakeTables(inputs_.constants(), memory_.data());
    }
  }

  const Identity& identity() const { return identity_; }

  void Compute(const Run& run) const {
    const Tensor x = run.Input(kLevelX);
    if (inputs_.all_constant()) {
      Requantize(run, x, tables_);
      return;
    }
    const Tensors inputs = inputs_.Read(run);
    CheckLevels(identity_, inputs);
    const Workspace workspace(Channels(inputs) * kChannelBytes);
    Requantize(run, x, MakeTables(inputs, workspace.data()));
  }

  static void InferShapes(const ShapeInference& inference) {
    std::vector<Axis> axes;
    if (inference.Input(kLevelX, &axes)) {
      inference.SetOutput(0, abi::kUint8, axes);
    }
  }

 private:
  static std::size_t Channels(const Tensors& inputs) {
    return static_cast<std::size_t>(inputs[kLevelTable].shape[0]);
  }

  LevelTables MakeTables(const Tensors& inputs, void* memory) const {
    const LevelCodes codes = CodesOfLevels(kernels_, inputs);
    const std::size_t channels = Channels(inputs);
    const auto* const levels = inputs[kLevelTable].As<std::uint8_t>();
    const auto count = static_cast<std::size_t>(inputs[kLevelTable].shape[1]);
    auto* const maps = static_cast<LevelMap*>(memory);
    for (std::size_t channel = 0; channel < channels; ++channel) {
      MakeMap(levels + channel * count, count, codes.data(), maps + channel);
    }
    LevelTables tables;
    tables.channels = channels;
    tables.maps = maps;
    if (behind_ == 0) {
      tables.rows = MakeRows(maps, channels, maps + channels);
    }
    return tables;
  }

  void Requantize(const Run& run, const Tensor& x, const LevelTables& tables) const {
    const std::size_t rank = x.shape.rank();
    const std::size_t channels = tables.channels;
    CheckChannels(identity_, x, channels, behind_);
    std::uint8_t* const y = run.Output<std::uint8_t>(0, x.shape);
    if (x.count == 0 || y == nullptr) {
      return;
    }
    const auto* const codes = x.As<std::uint8_t>();
    if (behind_ == 0 && channels >= quantize::kFewestPoints) {
      Across(run, codes, x.count / channels, tables.rows, y);
    } else {
      const std::size_t points = channels == 1 ? x.count : x.shape.Count(rank - behind_, rank);
      Planes(run, codes, x.count, points, tables, y);
    }
  }

  // Every task has its part of all elements, whether that is a part of one plane or many planes.
  void Planes(const Run& run, const std::uint8_t* x, std::size_t count, std::size_t points, const LevelTables& tables,
              std::uint8_t* y) const {
    run.ParallelFor((count + kTaskElements - 1) / kTaskElements, [&](std::size_t task) noexcept {
      const std::size_t end = std::min(count, (task + 1) * kTaskElements);
      std::size_t begin = task * kTaskElements;
      std::size_t plane_end = (begin / points + 1) * points;
      std::size_t channel = begin / points % tables.channels;
      for (; begin < end; plane_end += points) {
        const std::size_t stop = std::min(end, plane_end);
        const LevelMap& map = tables.maps[channel];
        if (points < quantize::kFewestPoints) {
          for (; begin < stop; ++begin) {
            y[begin] = map.level[x[begin]];
          }
        } else {
          kernels_.levels(x + begin, stop - begin, map, y + begin);
          begin = stop;
        }
        channel = channel + 1 == tables.channels ? 0 : channel + 1;
      }
    });
  }

  // Channels on the last axis: rows of them.
  void Across(const Run& run, const std::uint8_t* x, std::size_t count, const LevelRows& rows, std::uint8_t* y) const {
    const std::size_t group = std::max<std::size_t>(1, kTaskElements / rows.channels);
    run.ParallelFor((count + group - 1) / group, [&](std::size_t task) noexcept {
      const std::size_t begin = task * group * rows.channels;
      kernels_.levels_across(x + begin, std::min(group, count - task * group), rows, y + begin);
    });
  }

  Identity identity_;
  std::size_t behind_;  // axes behind that of the channels
  SideInputs inputs_;
  const quantize::Kernels& kernels_;
  std::vector<unsigned char> memory_;  // of tables_, if all side inputs are constants
  LevelTables tables_;
};

}  // namespace

void AddLutRequantize(const OrtApi* api, OperatorList* list) {
  list->push_back(std::make_shared<CustomOp<LutRequantize>>(api));
}

}  // namespace postquant
