// Gradients of simulated values: to x element by element; to levels from float64 sums in the order of memory,
//
//     B[b] = sum of grad * weight over the elements whose place has bin b        to level j: B[j] - B[j + 1]
//
// with bin 0 and weight 1 below the first level, bin s + 1 between levels s and s + 1, and the last bin and weight -1
// above the last level.
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
constexpr std::size_t kBins = kSimulatedLevels + 1;

// What there is per channel: rows of kPlaces and of kBins sums.
struct Sums {
  float* weight;
  std::uint8_t* bin;
  double* sum;
};

template <bool kMasked>
inline void AddOne(const float* grad, const float* mask, const std::int16_t* places, std::size_t i, const Sums& sums,
                   std::size_t channel) {
  const std::size_t place = channel * kPlaces + static_cast<std::size_t>(places[i]);
  const float quantized = kMasked ? grad[i] * mask[i] : grad[i];
  sums.sum[channel * kBins + sums.bin[place]] += static_cast<double>(quantized * sums.weight[place]);
}

// One row of elements of each of neighbouring channels.
template <std::size_t kRows, bool kMasked>
void AddRows(const float* grad, const float* mask, const std::int16_t* places, std::size_t inner, const Sums& sums,
             std::size_t channel) {
  for (std::size_t i = 0; i < inner; ++i) {
    for (std::size_t row = 0; row < kRows; ++row) {
      AddOne<kMasked>(grad, mask, places, row * inner + i, sums, channel + row);
    }
  }
}

template <bool kMasked>
void AddAll(const PostquantLevels& call, const float* grad, const std::int16_t* places, const Sums& sums) {
  const auto outer = static_cast<std::size_t>(call.outer);
  const auto channels = static_cast<std::size_t>(call.channels);
  const auto inner = static_cast<std::size_t>(call.inner);
  const auto masked = [&](std::size_t i) { return kMasked ? call.mask + i : nullptr; };
  for (std::size_t o = 0; o < outer; ++o) {
    const std::size_t begin = o * channels * inner;
    std::size_t c = 0;
    for (; c + kAtOnce <= channels; c += kAtOnce) {
      const std::size_t i = begin + c * inner;
      AddRows<kAtOnce, kMasked>(grad + i, masked(i), places + i, inner, sums, c);
    }
    for (; c < channels; ++c) {
      const std::size_t i = begin + c * inner;
      AddRows<1, kMasked>(grad + i, masked(i), places + i, inner, sums, c);
    }
  }
}

void MakeTables(const Kernels& kernels, const PostquantLevels& call, const std::uint8_t* codes, const Sums& sums) {
  const auto count = static_cast<std::size_t>(call.count);
  for (std::size_t c = 0; c < static_cast<std::size_t>(call.channels); ++c) {
    float* const weight = sums.weight + c * kPlaces;
    std::uint8_t* const bin = sums.bin + c * kPlaces;
    kernels.code_tables(CodesOf(codes + c * count, count), weight + 1, bin + 1);
    weight[0] = 1.0F;
    bin[0] = 0;
    weight[kPlaces - 1] = -1.0F;
    bin[kPlaces - 1] = static_cast<std::uint8_t>(count);
  }
}

void ToLevels(const Kernels& kernels, const PostquantLevels& call, const float* grad, const std::int16_t* places,
              float* to_levels) {
  const auto channels = static_cast<std::size_t>(call.channels);
  const auto count = static_cast<std::size_t>(call.count);
  Sums sums{};
  const Workspace workspace(Scratch::kLine + Scratch::Bytes<std::uint8_t>(channels * count) +
                            Scratch::Bytes<float>(channels * kPlaces) +
                            Scratch::Bytes<std::uint8_t>(channels * kPlaces) +
                            Scratch::Bytes<double>(channels * kBins));
  Scratch scratch(workspace.data());
  auto* const codes = scratch.Take<std::uint8_t>(channels * count);
  sums.weight = scratch.Take<float>(channels * kPlaces);
  sums.bin = scratch.Take<std::uint8_t>(channels * kPlaces);
  sums.sum = scratch.Take<double>(channels * kBins);
  std::fill(sums.sum, sums.sum + channels * kBins, 0.0);
  const CodeGrid grid(call.levels, channels * count);
  kernels.grid_codes(call.levels, channels * count, grid.step, grid.zero, codes);
  MakeTables(kernels, call, codes, sums);
  if (call.mask == nullptr) {
    AddAll<false>(call, grad, places, sums);
  } else {
    AddAll<true>(call, grad, places, sums);
  }
  for (std::size_t c = 0; c < channels; ++c) {
    for (std::size_t level = 0; level < count; ++level) {
      const double* const sum = sums.sum + c * kBins + level;
      to_levels[c * count + level] = static_cast<float>(sum[0] - sum[1]);
    }
  }
}

}  // namespace

void SimulateLevelsBack(const PostquantLevels& call, const float* grad, const std::int16_t* places, float* to_x,
                        float* to_levels) {
  const Kernels& kernels = SelectedKernels();
  if (to_levels != nullptr) {
    ToLevels(kernels, call, grad, places, to_levels);
  }
  if (to_x == nullptr) {
    return;
  }
  const auto size = static_cast<std::size_t>(call.outer * call.channels * call.inner);
  for (std::size_t i = 0; i < size; i += kPiece) {
    kernels.gradients_to_x(grad + i, call.mask == nullptr ? nullptr : call.mask + i, places + i,
                           std::min(kPiece, size - i), to_x + i);
  }
}

}  // namespace postquant::quantize
