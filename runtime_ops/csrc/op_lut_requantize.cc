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
using quantize::LevelRows;

constexpr std::size_t kTaskElements = 16384;  // about what is worth handing to another thread
constexpr std::size_t kCodes = 256;
constexpr std::int64_t kFewestLevels = 2;
constexpr std::int64_t kMostLevels = quantize::kMostSteps + 1;

// Memory of a channel's map, and of its numbers in LevelRows.
constexpr std::size_t kChannelBytes = sizeof(LevelMap) + 1 + 2 * quantize::kMostSteps;

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
      above[s * channels + channel] = map.above[s];
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
        inputs_(info, kXScale),
        kernels_(quantize::SelectedKernels()) {
    if (inputs_.all_constant()) {
      Validate(inputs_.constants());
      memory_.resize(Channels(inputs_.constants()) * kChannelBytes);
      tables_ = MakeTables(inputs_.constants(), memory_.data());
    }
  }

  const Identity& identity() const { return identity_; }

  void Compute(const Run& run) const {
    const Tensor x = run.Input(kX);
    if (inputs_.all_constant()) {
      Requantize(run, x, tables_);
      return;
    }
    const Tensors inputs = inputs_.Read(run);
    Validate(inputs);
    const Workspace workspace(Channels(inputs) * kChannelBytes);
    Requantize(run, x, MakeTables(inputs, workspace.data()));
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

  LevelTables MakeTables(const Tensors& inputs, void* memory) const {
    std::uint8_t all[kCodes];
    std::uint8_t codes[kCodes];
    for (std::size_t i = 0; i < kCodes; ++i) {
      all[i] = static_cast<std::uint8_t>(i);
    }
    kernels_.requantize(all, kCodes, *inputs[kXScale].As<float>(), *inputs[kXZeroPoint].As<std::uint8_t>(),
                        *inputs[kScale].As<float>(), {*inputs[kZeroPoint].As<std::uint8_t>(), 0, 255}, codes);
    const std::size_t channels = Channels(inputs);
    const auto* const levels = inputs[kTable].As<std::uint8_t>();
    const auto count = static_cast<std::size_t>(inputs[kTable].shape[1]);
    auto* const maps = static_cast<LevelMap*>(memory);
    for (std::size_t channel = 0; channel < channels; ++channel) {
      MakeMap(levels + channel * count, count, codes, maps + channel);
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
    const bool fits = behind_ < rank && static_cast<std::size_t>(x.shape[rank - 1 - behind_]) == channels;
    if (rank == 0) {
      identity_.FailInput(kX, "has shape [], expected one axis or more");
    }
    if (channels != 1 && !fits) {
      identity_.FailInput(kX, "has shape " + x.shape.Text() + ", expected " + std::to_string(channels) +
                                  " channels on axis -" + std::to_string(behind_ + 1));
    }
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
