// Simulated values: tiles of positions, all channels of which error feedback sees together.
#include <algorithm>
#include <cstddef>

#include "feedback_tile.h"
#include "scratch.h"
#include "simulate_passes.h"
#include "simulate_tables.h"
#include "workspace.h"

namespace postquant::quantize {
namespace {

constexpr std::size_t kShiftBytes = sizeof(std::int16_t);

struct Shape {
  explicit Shape(const PostquantLevels& call)
      : outer(static_cast<std::size_t>(call.outer)),
        channels(static_cast<std::size_t>(call.channels)),
        inner(static_cast<std::size_t>(call.inner)),
        across(inner == 1 && channels > 1) {}
  std::size_t outer;
  std::size_t channels;
  std::size_t inner;
  bool across;  // whether elements of all channels follow each other
};

// `count` elements from the `i`th on.
SimulatedValues Part(const SimulatedValues& values, std::size_t i) {
  return {values.x + i,    values.mask == nullptr ? nullptr : values.mask + i, values.shift, values.step, values.y + i,
          values.places + i};
}

void WithoutFeedback(const Kernels& kernels, const Shape& shape, const SimulatedLevels& levels,
                     const SimulatedValues& values) {
  if (shape.across) {
    // Rows some at a time, so that they stay in the cache while all channels pass.
    const std::size_t most = std::max<std::size_t>(1, (std::size_t{1} << 15) / shape.channels);
    for (std::size_t row = 0; row < shape.outer; row += most) {
      kernels.simulate_across(Part(values, row * shape.channels), std::min(most, shape.outer - row), levels);
    }
    return;
  }
  for (std::size_t row = 0; row < shape.outer * shape.channels; ++row) {
    kernels.simulate_row(Part(values, row * shape.inner), shape.inner, levels, row % shape.channels);
  }
}

// -- error feedback ----------------------------------------------------------------------------------------------

// Rows of kTilePositions are by channel; those of `across` by position, of all channels.
struct Rooms {
  FeedbackScratch feedback;
  std::uint8_t* codes;
  std::uint8_t* kept;
  std::int16_t* shifts;
  std::uint8_t* across;           // codes or kept
  std::int16_t* shifts_across;
  float row[kTilePositions];
  float mask[kTilePositions];
  float simulated[kTilePositions];
  std::int16_t places[kTilePositions];
};

struct Feedbacks {
  const Kernels& kernels;
  const FeedbackPlan& plan;
  const SimulatedLevels& levels;
  const CodeGrid& grid;
  const SimulatedValues& values;
};

// The tile's positions `begin` to `end` of elements that lie across channels.
void AcrossTile(const Feedbacks& with, Rooms* rooms, std::size_t begin, std::size_t end) {
  const std::size_t channels = with.plan.channels;
  const std::size_t count = end - begin;
  SimulatedValues part = Part(with.values, begin * channels);
  with.kernels.grid_codes(part.x, count * channels, with.grid.step, with.grid.zero, rooms->across);
  with.kernels.turn(rooms->across, channels, count, channels, rooms->codes, kTilePositions);
  if (part.mask != nullptr) {
    with.kernels.mask_bytes(part.mask, count * channels, rooms->across);
    with.kernels.turn(rooms->across, channels, count, channels, rooms->kept, kTilePositions);
  }
  with.kernels.tile_shifts(with.plan, rooms->feedback, rooms->codes, part.mask == nullptr ? nullptr : rooms->kept,
                           rooms->shifts);
  // Both bytes of every number turn as one element each, and are put together again.
  with.kernels.turn(static_cast<const std::uint8_t*>(static_cast<const void*>(rooms->shifts)),
                    kTilePositions * kShiftBytes, channels, count * kShiftBytes, rooms->across, channels);
  for (std::size_t p = 0; p < count; ++p) {
    const std::uint8_t* const low = rooms->across + p * kShiftBytes * channels;
    const std::uint8_t* const high = low + channels;
    std::int16_t* const to = rooms->shifts_across + p * channels;
    for (std::size_t c = 0; c < channels; ++c) {
      to[c] = static_cast<std::int16_t>(low[c] | high[c] << 8);
    }
  }
  part.shift = rooms->shifts_across;
  with.kernels.simulate_across(part, count, with.levels);
}

void Gather(const FeedbackTile& tile, const float* from, float* row) {
  for (std::size_t i = 0; i < tile.runs; row += tile.run[i].count, ++i) {
    std::copy(from + tile.run[i].first, from + tile.run[i].first + tile.run[i].count, row);
  }
}

template <typename T>
void Scatter(const FeedbackTile& tile, const T* row, T* to) {
  for (std::size_t i = 0; i < tile.runs; row += tile.run[i].count, ++i) {
    std::copy(row, row + tile.run[i].count, to + tile.run[i].first);
  }
}

// Positions that follow each other in every channel, in one place or in several.
void ChannelTile(const Feedbacks& with, Rooms* rooms, const FeedbackTile& tile, std::size_t count) {
  const std::size_t channels = with.plan.channels;
  const SimulatedValues& all = with.values;
  const bool one = tile.runs == 1;
  for (std::size_t c = 0; c < channels; ++c) {
    const std::size_t first = c * tile.channel_step;
    const float* row = all.x + first + tile.run[0].first;
    if (!one) {
      Gather(tile, all.x + first, rooms->row);
      row = rooms->row;
    }
    with.kernels.grid_codes(row, count, with.grid.step, with.grid.zero, rooms->codes + c * kTilePositions);
    if (all.mask != nullptr) {
      const float* mask = all.mask + first + tile.run[0].first;
      if (!one) {
        Gather(tile, all.mask + first, rooms->mask);
        mask = rooms->mask;
      }
      with.kernels.mask_bytes(mask, count, rooms->kept + c * kTilePositions);
    }
  }
  with.kernels.tile_shifts(with.plan, rooms->feedback, rooms->codes, all.mask == nullptr ? nullptr : rooms->kept,
                           rooms->shifts);
  for (std::size_t c = 0; c < channels; ++c) {
    const std::size_t first = c * tile.channel_step;
    SimulatedValues part = Part(all, first + tile.run[0].first);
    if (!one) {
      Gather(tile, all.x + first, rooms->row);
      if (all.mask != nullptr) {
        Gather(tile, all.mask + first, rooms->mask);
      }
      part = {rooms->row, all.mask == nullptr ? nullptr : rooms->mask, nullptr, all.step, rooms->simulated,
              rooms->places};
    }
    part.shift = rooms->shifts + c * kTilePositions;
    with.kernels.simulate_row(part, count, with.levels, c);
    if (!one) {
      Scatter(tile, rooms->simulated, all.y + first);
      Scatter(tile, rooms->places, all.places + first);
    }
  }
}

FeedbackPlan MakePlan(const PostquantFeedback& from, std::size_t channels, const std::size_t* order,
                      const LevelMap* maps) {
  FeedbackPlan plan{};
  plan.channels = channels;
  plan.cell = 1;
  plan.rank = static_cast<std::size_t>(from.rank);
  plan.groups = static_cast<std::size_t>(from.groups);
  std::transform(from.ends, from.ends + from.groups, plan.ends, [](std::int64_t end) {
    return static_cast<std::size_t>(end);
  });
  plan.order = order;
  plan.maps = maps;
  plan.map_step = 1;
  plan.left = from.left;
  plan.left_scale = from.left_scale;
  plan.right = from.right;
  plan.right_scale = from.right_scale;
  return plan;
}

void WithFeedback(const Kernels& kernels, const Shape& shape, const PostquantLevels& call,
                  const CodeGrid& grid, const std::uint8_t* level_codes, const SimulatedLevels& levels,
                  SimulatedValues values) {
  const std::size_t channels = shape.channels;
  const auto count = static_cast<std::size_t>(call.count);
  const std::size_t elements = channels * kTilePositions;
  const auto rank = static_cast<std::size_t>(call.feedback->rank);
  using Room = Scratch;
  const Workspace workspace(Room::kLine + Room::Bytes<std::size_t>(channels) + Room::Bytes<LevelMap>(channels) +
                            Room::Bytes<std::int32_t>(rank * kTilePositions) +
                            Room::Bytes<std::int16_t>(Even(rank) * kTilePositions) +
                            4 * Room::Bytes<std::int16_t>(elements) + 2 * Room::Bytes<std::uint8_t>(elements));
  Room room(workspace.data());
  auto* const order = room.Take<std::size_t>(channels);
  auto* const maps = room.Take<LevelMap>(channels);
  for (std::size_t c = 0; c < channels; ++c) {
    order[c] = static_cast<std::size_t>(call.feedback->order[c]);
    MapLevels(level_codes + c * count, count, kernels.looks_levels_up, maps + c);
  }
  const FeedbackPlan plan = MakePlan(*call.feedback, channels, order, maps);
  Rooms rooms;
  rooms.feedback = {};
  rooms.feedback.sums = room.Take<std::int32_t>(rank * kTilePositions);
  rooms.feedback.inner = room.Take<std::int16_t>(Even(rank) * kTilePositions);
  rooms.feedback.errors = room.Take<std::int16_t>(elements);
  rooms.shifts = room.Take<std::int16_t>(elements);
  rooms.shifts_across = room.Take<std::int16_t>(elements);
  rooms.across = room.Take<std::uint8_t>(elements * kShiftBytes);
  rooms.codes = room.Take<std::uint8_t>(elements);
  rooms.kept = room.Take<std::uint8_t>(elements);
  // What is beyond the positions of a tile is read, whatever it is.
  std::fill(rooms.codes, rooms.codes + elements, std::uint8_t{0});
  std::fill(rooms.kept, rooms.kept + elements, std::uint8_t{0});
  values.step = grid.step;
  const Feedbacks with = {kernels, plan, levels, grid, values};
  const std::size_t positions = shape.outer * shape.inner;
  for (std::size_t begin = 0; begin < positions; begin += kTilePositions) {
    const std::size_t end = std::min(positions, begin + kTilePositions);
    if (shape.across) {
      AcrossTile(with, &rooms, begin, end);
    } else {
      ChannelTile(with, &rooms, TileOf(begin, end, channels, shape.inner), end - begin);
    }
  }
}

}  // namespace

void SimulateLevels(const PostquantLevels& call, const float* x, float* y, std::int16_t* places) {
  const Kernels& kernels = SelectedKernels();
  const Shape shape(call);
  const auto count = static_cast<std::size_t>(call.count);
  const std::size_t numbers = shape.channels * kSimulatedLevels;
  const Workspace workspace(Scratch::kLine + Scratch::Bytes<std::uint8_t>(shape.channels * count) +
                            2 * Scratch::Bytes<float>(shape.channels) + 2 * Scratch::Bytes<float>(numbers));
  Scratch scratch(workspace.data());
  auto* const codes = scratch.Take<std::uint8_t>(shape.channels * count);
  const CodeGrid grid(call.levels, shape.channels * count);
  kernels.grid_codes(call.levels, shape.channels * count, grid.step, grid.zero, codes);
  LevelRoom room{};
  room.bottom = scratch.Take<float>(shape.channels);
  room.top = scratch.Take<float>(shape.channels);
  room.first = scratch.Take<float>(numbers);
  room.level = scratch.Take<float>(numbers);
  const SimulatedLevels levels = MakeLevels(grid, codes, shape.channels, count, shape.across, room);
  const SimulatedValues values = {x, call.mask, nullptr, 0.0F, y, places};
  if (call.feedback == nullptr) {
    WithoutFeedback(kernels, shape, levels, values);
  } else {
    WithFeedback(kernels, shape, call, grid, codes, levels, values);
  }
}

}  // namespace postquant::quantize
