// How one call is split into phases and items.
#include <algorithm>
#include <limits>

#include "lut_weights.h"

namespace postquant::lut {
namespace {

// An item should take at least this long, so that handing it to a thread costs little.
constexpr double kItemNanoseconds = 3000.0;
constexpr double kCopiedBytesPerNanosecond = 8.0;
constexpr double kPackedBytesPerNanosecond = 50.0;
constexpr std::int64_t kMostPlanarPixels = 1024;  // of an item: its activations should stay in a near cache
constexpr double kPlanarMacsPerNanosecond = 200.0;
constexpr double kPlanarOutputNanoseconds = 0.08;  // to requantize

// Allocations beyond this are refused before their sizes can overflow.
constexpr std::int64_t kMostBytes = std::int64_t{1} << 60;

bool SetWorkspace(std::int64_t activations, Plan* plan) {
  if (activations > kMostBytes ||
      static_cast<std::uint64_t>(activations) > std::numeric_limits<std::size_t>::max() / 2) {
    return false;
  }
  plan->workspace = activations == 0 ? 0 : static_cast<std::size_t>(activations) + kAlignment + kSlack;
  return true;
}

// Rows of phase 0 per item.
void SetLayoutItems(std::int64_t images, std::int64_t rows, std::int64_t row_bytes, Plan* plan) {
  const auto enough =
      static_cast<std::int64_t>(kItemNanoseconds * kCopiedBytesPerNanosecond) / std::max<std::int64_t>(row_bytes, 1);
  plan->layout_rows = std::clamp<std::int64_t>(enough, 1, std::max<std::int64_t>(rows, 1));
  plan->items[0] = images * DivideUp(rows, plan->layout_rows);
  plan->cost[0] = static_cast<double>(plan->layout_rows * row_bytes) / kCopiedBytesPerNanosecond;
}

// Panels per item of phase 1, given the nanoseconds of one.
std::int64_t PanelsPerItem(double cost, std::int64_t panels) {
  const double enough = kItemNanoseconds / std::max(cost, 1.0);
  return enough >= static_cast<double>(panels) ? std::max<std::int64_t>(panels, 1)
                                               : std::max<std::int64_t>(static_cast<std::int64_t>(enough), 1);
}

double PanelCost(const Weights& w, std::int64_t rows) {
  return static_cast<double>(rows) * static_cast<double>(w.inputs) * w.table->panel_width / w.table->macs_per_ns;
}

// Even blocks of whole register tiles.
std::int64_t BlockRows(const Weights& w, std::int64_t rows) {
  const std::int64_t most = kMaxRows / w.table->row_tile * w.table->row_tile;
  const std::int64_t blocks = std::max<std::int64_t>(DivideUp(rows, most), 1);
  return std::clamp<std::int64_t>(RoundUp(DivideUp(rows, blocks), w.table->row_tile), w.table->row_tile, most);
}

}  // namespace

MatMulRows RowsOf(const Weights& w, const Requantizer& r, std::int64_t rows) {
  const bool few = rows <= w.table->gemv_rows;
  const std::int64_t elements = ElementBytes(*w.table);
  const bool raw = r.x_flip == 0 && w.table->activation != Activation::kCentered;
  const std::int64_t multiple = few ? w.CodesPerStep() : w.table->direct_bytes;
  const bool in_place = raw && multiple > 0 && w.inputs % multiple == 0;
  const std::int64_t padding = few ? w.CodesPerStep() : static_cast<std::int64_t>(kAlignment) / elements;
  return {few, in_place, RoundUp(w.inputs, padding)};
}

std::int64_t ChannelGroups(const Weights& w) {
  return DivideUp(w.geometry.in_channels / w.geometry.group, kPlanarChannels);
}

std::int64_t PlaneBytes(const Plan& plan) {
  constexpr auto kLine = static_cast<std::int64_t>(kAlignment);
  const std::int64_t lines =
      DivideUp(plan.padded_size[0] * plan.out_size[1] * static_cast<std::int64_t>(kWord), kLine);
  // Planes that are a power of two apart would share few sets of the cache.
  return (lines % 8 == 0 ? lines + 4 : lines) * kLine;
}

std::int64_t ImageBytes(const Weights& w, const Plan& plan) {
  if (w.method == Method::kPlanar) {
    return PlaneBytes(plan) * w.geometry.kernel[1] * ChannelGroups(w);
  }
  return RoundUp(plan.padded_size[0] * plan.padded_size[1] * (w.geometry.in_channels / w.geometry.group) *
                     ElementBytes(*w.table),
                 static_cast<std::int64_t>(kAlignment));
}

Status PlanMatMul(const Weights& w, const Requantizer& r, std::int64_t rows, Plan* plan) {
  *plan = Plan();
  std::int64_t size = 0;
  if (w.method != Method::kMatMul || !Multiply(rows, w.inputs + 64, &size) || !Multiply(rows, w.outputs, &size)) {
    return Status::kBadShape;
  }
  plan->rows = rows;
  if (rows == 0 || w.outputs == 0) {
    return Status::kOk;
  }
  const MatMulRows layout = RowsOf(w, r, rows);
  if (!layout.few) {
    if (const Status status = EnsureDecoded(w); status != Status::kOk) {
      return status;
    }
  }
  const std::int64_t row_bytes = layout.padded * ElementBytes(*w.table);
  if (!layout.in_place && (!Multiply(rows, row_bytes, &size) || !SetWorkspace(size, plan))) {
    return Status::kBadShape;
  }
  if (!layout.in_place) {
    SetLayoutItems(1, rows, row_bytes, plan);
  }
  plan->rows_per_item = layout.few ? rows : BlockRows(w, rows);
  const std::int64_t block = std::min(plan->rows_per_item, rows);
  const double reading = layout.few ? static_cast<double>(w.packed_bytes) / kPackedBytesPerNanosecond : 0.0;
  const double cost = std::max(PanelCost(w, block), reading);
  plan->panels_per_item = PanelsPerItem(cost, w.group_panels);
  plan->items[1] = DivideUp(rows, plan->rows_per_item) * DivideUp(w.group_panels, plan->panels_per_item);
  plan->cost[1] = cost * static_cast<double>(plan->panels_per_item);
  return Status::kOk;
}

Status PlanConv(const Weights& w, const Requantizer&, std::int64_t batch, std::int64_t height, std::int64_t width,
                Plan* plan) {
  *plan = Plan();
  const ConvGeometry& g = w.geometry;
  constexpr std::int64_t kMost = std::int64_t{1} << 40;
  if (w.method == Method::kMatMul || batch < 0 || height < 0 || width < 0 || height > kMost || width > kMost) {
    return Status::kBadShape;
  }
  plan->rows = batch;
  plan->in_size[0] = height;
  plan->in_size[1] = width;
  for (int axis = 0; axis < 2; ++axis) {
    plan->padded_size[axis] = plan->in_size[axis] + g.pad_begin[axis] + g.pad_end[axis];
    const std::int64_t spare = plan->padded_size[axis] - ((g.kernel[axis] - 1) * g.dilation[axis] + 1);
    if (spare < 0) {
      return Status::kBadShape;
    }
    plan->out_size[axis] = spare / g.stride[axis] + 1;
  }
  const std::int64_t channels = g.in_channels / g.group;
  std::int64_t images = 0;
  std::int64_t plane = 0;
  std::int64_t size = 0;
  std::int64_t pixels = 0;
  if (!Multiply(batch, g.group, &images) || !Multiply(plan->padded_size[0], plan->padded_size[1], &plane) ||
      plane > kMost || !Multiply(plane, channels * 2 + 1, &size) || size > kMostBytes ||
      !Multiply(images, ImageBytes(w, *plan), &size) || !SetWorkspace(size, plan) ||
      !Multiply(plan->out_size[0], plan->out_size[1], &pixels) || !Multiply(pixels, batch, &size) ||
      !Multiply(size, g.out_channels, &size)) {
    return Status::kBadShape;
  }
  if (batch == 0 || g.out_channels == 0) {
    plan->workspace = 0;
    return Status::kOk;
  }
  if (w.method == Method::kDepthwise) {
    // A plane is laid out by the item that needs it.
    plan->rows_per_item = pixels;
    const double cost = static_cast<double>(plane) / kCopiedBytesPerNanosecond +
                        static_cast<double>(pixels * w.group_outputs) * static_cast<double>(w.inputs) / 20.0;
    plan->panels_per_item = PanelsPerItem(cost, images);
    plan->items[1] = DivideUp(images, plan->panels_per_item);
    plan->cost[1] = cost * static_cast<double>(plan->panels_per_item);
    return Status::kOk;
  }
  if (w.method == Method::kPlanar) {
    const std::int64_t parts = DivideUp(pixels, kMostPlanarPixels);
    SetLayoutItems(images, ChannelGroups(w), PlaneBytes(*plan) * g.kernel[1], plan);
    plan->rows_per_item = RoundUp(DivideUp(pixels, parts), 64);
    const auto places = static_cast<double>(std::min(plan->rows_per_item, pixels) * kPlanarRows);
    const double cost = places * (static_cast<double>(w.inputs) / kPlanarMacsPerNanosecond + kPlanarOutputNanoseconds);
    plan->panels_per_item = PanelsPerItem(cost, w.group_panels);
    plan->items[1] =
        images * DivideUp(pixels, plan->rows_per_item) * DivideUp(w.group_panels, plan->panels_per_item);
    plan->cost[1] = cost * static_cast<double>(plan->panels_per_item);
    return Status::kOk;
  }
  SetLayoutItems(images, plan->padded_size[0], plan->padded_size[1] * channels * ElementBytes(*w.table), plan);
  plan->rows_per_item = BlockRows(w, pixels);
  const double cost = PanelCost(w, std::min(plan->rows_per_item, pixels));
  plan->panels_per_item = PanelsPerItem(cost, w.group_panels);
  plan->items[1] =
      images * DivideUp(pixels, plan->rows_per_item) * DivideUp(w.group_panels, plan->panels_per_item);
  plan->cost[1] = cost * static_cast<double>(plan->panels_per_item);
  return Status::kOk;
}

}  // namespace postquant::lut
