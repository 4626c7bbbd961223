// Gradients of simulated values: to x element by element, to levels from sums over the cells of every channel's grid.
#include <algorithm>
#include <cstddef>

#include "scratch.h"
#include "simulate_passes.h"
#include "simulate_tables.h"
#include "workspace.h"

namespace postquant::quantize {
namespace {

constexpr std::size_t kAtOnce = 4;  // channels whose sums do not wait for each other
constexpr std::size_t kPiece = 4096;

// The sums of one row of elements each, of neighbouring channels; every cell's in the order of memory.
template <std::size_t kRows, bool kMasked>
void AddRows(const float* grad, const float* mask, const std::int16_t* places, std::size_t inner, std::size_t width,
             float* sums) {
  for (std::size_t i = 0; i < inner; ++i) {
    for (std::size_t row = 0; row < kRows; ++row) {
      const std::size_t at = row * inner + i;
      sums[row * width + static_cast<std::size_t>(places[at])] += kMasked ? grad[at] * mask[at] : grad[at];
    }
  }
}

// As AddRows where elements of all channels follow each other.
template <bool kMasked>
void AddAcross(const float* grad, const float* mask, const std::int16_t* places, std::size_t channels,
               std::size_t width, float* sums) {
  for (std::size_t c = 0; c < channels; ++c, sums += width) {
    sums[static_cast<std::size_t>(places[c])] += kMasked ? grad[c] * mask[c] : grad[c];
  }
}

template <bool kMasked>
void AddAll(const PostquantLevels& call, const float* grad, const std::int16_t* places, std::size_t width,
            float* sums) {
  const auto outer = static_cast<std::size_t>(call.outer);
  const auto channels = static_cast<std::size_t>(call.channels);
  const auto inner = static_cast<std::size_t>(call.inner);
  const auto masked = [&](std::size_t i) { return kMasked ? call.mask + i : nullptr; };
  for (std::size_t o = 0; o < outer; ++o) {
    const std::size_t begin = o * channels * inner;
    if (inner == 1) {
      AddAcross<kMasked>(grad + begin, masked(begin), places + begin, channels, width, sums);
      continue;
    }
    std::size_t c = 0;
    for (; c + kAtOnce <= channels; c += kAtOnce) {
      const std::size_t i = begin + c * inner;
      AddRows<kAtOnce, kMasked>(grad + i, masked(i), places + i, inner, width, sums + c * width);
    }
    for (; c < channels; ++c) {
      const std::size_t i = begin + c * inner;
      AddRows<1, kMasked>(grad + i, masked(i), places + i, inner, width, sums + c * width);
    }
  }
}

// What a sum over a cell means for the levels below and above it: `to_above`, and as much less to the other.
void FindShares(const LevelGrid& grid, std::size_t count, float* to_above, std::uint8_t* below) {
  for (std::size_t s = 0; s + 1 < count; ++s) {
    const std::size_t end = grid.first(s + 1);
    for (std::size_t cell = grid.first(s); cell < end; ++cell) {
      const float share = grid.Share(cell, s);
      to_above[cell] = (share >= 0.5F ? 1.0F : 0.0F) - share;
      below[cell] = static_cast<std::uint8_t>(s);
    }
  }
}

// The gradients to the levels of kAtOnce channels at most.
void LevelsOfSums(const PostquantLevels& call, std::size_t channel, std::size_t some, const float* sums,
                  float* to_above, std::uint8_t* below, float* to_levels) {
  const auto count = static_cast<std::size_t>(call.count);
  const auto cells = static_cast<std::size_t>(call.cells);
  const std::size_t width = cells + 3;
  float found[kAtOnce][kSimulatedLevels] = {};
  for (std::size_t k = 0; k < some; ++k) {
    FindShares(LevelGrid(call.levels + (channel + k) * count, count, cells), count, to_above + k * width,
               below + k * width);
    found[k][0] = sums[k * width];
    found[k][count - 1] = sums[k * width + width - 1];
  }
  for (std::size_t cell = 0; cell <= cells; ++cell) {
    for (std::size_t k = 0; k < some; ++k) {
      const float part = sums[k * width + 1 + cell] * to_above[k * width + cell];
      const std::size_t left = below[k * width + cell];
      found[k][left + 1] += part;
      found[k][left] -= part;
    }
  }
  for (std::size_t k = 0; k < some; ++k) {
    std::copy(found[k], found[k] + count, to_levels + (channel + k) * count);
  }
}

void ToLevels(const PostquantLevels& call, const float* grad, const std::int16_t* places, float* to_levels) {
  const auto channels = static_cast<std::size_t>(call.channels);
  const std::size_t width = static_cast<std::size_t>(call.cells) + 3;
  const Workspace workspace(Scratch::kLine + Scratch::Bytes<float>(channels * width) +
                            Scratch::Bytes<float>(kAtOnce * width) + Scratch::Bytes<std::uint8_t>(kAtOnce * width));
  Scratch scratch(workspace.data());
  auto* const sums = scratch.Take<float>(channels * width);
  auto* const to_above = scratch.Take<float>(kAtOnce * width);
  auto* const below = scratch.Take<std::uint8_t>(kAtOnce * width);
  std::fill(sums, sums + channels * width, 0.0F);
  std::fill(to_above, to_above + kAtOnce * width, 0.0F);
  std::fill(below, below + kAtOnce * width, std::uint8_t{0});
  if (call.mask == nullptr) {
    AddAll<false>(call, grad, places, width, sums);
  } else {
    AddAll<true>(call, grad, places, width, sums);
  }
  for (std::size_t c = 0; c < channels; c += kAtOnce) {
    LevelsOfSums(call, c, std::min(kAtOnce, channels - c), sums + c * width, to_above, below, to_levels);
  }
}

}  // namespace

void SimulateLevelsBack(const PostquantLevels& call, const float* grad, const std::int16_t* places, float* to_x,
                        float* to_levels) {
  if (to_levels != nullptr) {
    ToLevels(call, grad, places, to_levels);
  }
  if (to_x == nullptr) {
    return;
  }
  const Kernels& kernels = SelectedKernels();
  const auto last = static_cast<std::int16_t>(call.cells + 2);
  const auto size = static_cast<std::size_t>(call.outer * call.channels * call.inner);
  for (std::size_t i = 0; i < size; i += kPiece) {
    kernels.gradients_to_x(grad + i, call.mask == nullptr ? nullptr : call.mask + i, places + i,
                           std::min(kPiece, size - i), last, to_x + i);
  }
}

}  // namespace postquant::quantize
