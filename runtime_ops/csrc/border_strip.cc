#include "border_strip.h"

#include <algorithm>
#include <cstring>

#include "scratch.h"

namespace postquant {
namespace {

constexpr std::size_t kStripBytes = std::size_t{512} << 10;  // of scratch: half of a common second-level cache

std::size_t Padded(std::size_t count) {
  return (count + quantize::kPadding - 1) / quantize::kPadding * quantize::kPadding;
}

// Elements of the padded copy of one channel's residuals, and those that kernels read and write beyond it.
std::size_t PaddedPlane(const BorderCoefficients& coefficients, const StripPlan& plan) {
  return Padded((plan.rows + 2 * plan.above) * plan.stride) + coefficients.columns + quantize::kPadding;
}

std::size_t WideSums(const StripPlan& plan) { return Padded(plan.rows * plan.stride) + quantize::kPadding; }

std::size_t ScratchBytes(const BorderCoefficients& coefficients, const StripPlan& plan) {
  std::size_t bytes = Scratch::kLine;
  bytes += plan.channels * (Scratch::Bytes<float>(plan.points) + Scratch::Bytes<std::int16_t>(plan.points));
  if (coefficients.has_window) {
    bytes += Scratch::Bytes<std::int16_t>(PaddedPlane(coefficients, plan)) +
             Scratch::Bytes<std::int16_t>(WideSums(plan)) +
             Scratch::Bytes<std::int16_t>(plan.points);
  }
  if (plan.mixed) {
    bytes += (quantize::Even(coefficients.rank) / 2 + 1) * Scratch::Bytes<float>(plan.points);
  }
  return bytes;
}

// What a window is summed over: the residuals of the rows that are there, and how many rows of its reach are missing
// above them, because the image ends.
struct WindowTask {
  const std::int16_t* residual;  // [count, width]
  std::size_t missing;
  std::size_t count;
  std::size_t rows;  // of outputs
};

// Leaves the sums of `task.rows` rows, `width` apart, in `sums`.
void SumWindow(const BorderCoefficients& coefficients, const StripPlan& plan, const quantize::Kernels& kernels,
               std::size_t channel, const WindowTask& task, std::int16_t* padded, std::int16_t* wide,
               std::int16_t* sums) {
  const std::size_t width = plan.width;
  const std::size_t begin = task.missing * plan.stride + coefficients.columns / 2;
  const std::size_t end = begin + (task.count - 1) * plan.stride + width;
  std::memset(padded, 0, begin * sizeof(std::int16_t));
  kernels.spread_rows(task.residual, width, task.count, plan.stride, padded + begin);
  std::memset(padded + end, 0, (PaddedPlane(coefficients, plan) - end) * sizeof(std::int16_t));
  kernels.window(padded, plan.stride, coefficients.window + channel * coefficients.rows * coefficients.columns,
                 coefficients.rows, coefficients.columns, (task.rows - 1) * plan.stride + width, wide);
  kernels.gather_rows(wide, width, task.rows, plan.stride, sums);
}

}  // namespace

StripPlan::StripPlan(const BorderCoefficients& coefficients, std::size_t image_height, std::size_t image_width)
    : mixed(coefficients.rank > 0),
      height(image_height),
      width(image_width),
      above(coefficients.has_window ? coefficients.rows / 2 : 0),
      stride(coefficients.has_window ? image_width + coefficients.columns - 1 : image_width),
      rows(0),
      strips(0),
      points(0),
      channels(mixed ? coefficients.channels : 1),
      scratch(0) {
  const std::size_t row_bytes = channels * width * 6 + (coefficients.rank / 2 + 2) * stride * 4;
  rows = std::clamp<std::size_t>(kStripBytes / row_bytes, 1, height);
  strips = (height + rows - 1) / rows;
  rows = (height + strips - 1) / strips;  // even strips
  strips = (height + rows - 1) / rows;
  points = Padded(std::min(rows + 2 * above, height) * width + quantize::kPadding);
  scratch = ScratchBytes(coefficients, *this);
}

void QuantizeStrip(const BorderCoefficients& coefficients, const StripPlan& plan, const quantize::Kernels& kernels,
                   std::size_t channel, std::size_t strip, const float* x, std::uint8_t* y, void* scratch) noexcept {
  const std::size_t plane = plan.height * plan.width;
  const std::size_t begin = strip * plan.rows;
  const std::size_t rows = std::min(plan.rows, plan.height - begin);
  const std::size_t count = rows * plan.width;
  const std::size_t first = begin - std::min(begin, plan.above);  // with the rows above and below
  const std::size_t last = std::min(plan.height, begin + rows + plan.above);
  const std::size_t own = (begin - first) * plan.width;  // where the strip itself begins

  Scratch memory(scratch);
  const std::size_t ratio_step = Scratch::Bytes<float>(plan.points) / sizeof(float);
  const std::size_t residual_step = Scratch::Bytes<std::int16_t>(plan.points) / sizeof(std::int16_t);
  auto* const ratios = memory.Take<float>(plan.channels * ratio_step);
  auto* const residuals = memory.Take<std::int16_t>(plan.channels * residual_step);
  for (std::size_t c = 0; c < plan.channels; ++c) {
    kernels.residual(x + (channel + c) * plane + first * plan.width, (last - first) * plan.width, coefficients.scale,
                     coefficients.range, ratios + c * ratio_step, residuals + c * residual_step);
  }
  std::int16_t* padded = nullptr;
  std::int16_t* wide = nullptr;
  std::int16_t* window = nullptr;
  if (coefficients.has_window) {
    padded = memory.Take<std::int16_t>(PaddedPlane(coefficients, plan));
    wide = memory.Take<std::int16_t>(WideSums(plan));
    window = memory.Take<std::int16_t>(plan.points);
  }
  float* across = nullptr;
  std::int16_t* inner = nullptr;  // two of them take the room of a float
  if (plan.mixed) {
    across = memory.Take<float>(ratio_step);
    inner = memory.Take<std::int16_t>(quantize::Even(coefficients.rank) * ratio_step);
    kernels.mix(residuals + own, residual_step, coefficients.left.data(), coefficients.channels,
                coefficients.left_scale, coefficients.rank, count, inner, 2 * ratio_step);
  }
  for (std::size_t c = 0; c < plan.channels; ++c) {
    const std::size_t index = channel + c;
    if (window != nullptr) {
      const std::size_t missing = plan.above - (begin - first);
      SumWindow(coefficients, plan, kernels, index, {residuals + c * residual_step, missing, last - first, rows},
                padded, wide, window);
    }
    if (across != nullptr) {
      kernels.combine(inner, 2 * ratio_step, coefficients.right.data() + index * quantize::Even(coefficients.rank),
                      coefficients.rank, count, across);
    }
    kernels.decide(ratios + c * ratio_step + own, count, coefficients.range, coefficients.Channel(index),
                   {window, across}, y + index * plane + begin * plan.width);
  }
}

}  // namespace postquant
