// The items of a planar convolution; a part of lut_run.cc.
#ifndef POSTQUANT_CSRC_LUT_RUN_PLANAR_H_
#define POSTQUANT_CSRC_LUT_RUN_PLANAR_H_

#include <algorithm>
#include <cstdint>

#include "lut_planar.h"
#include "lut_weights.h"

namespace postquant::lut {
namespace {

// One call with everything it works on.
struct Job {
  const Weights& weights;
  const Requantizer& requantizer;
  const Plan& plan;
  const std::uint8_t* x;
  std::uint8_t* y;
  std::uint8_t* activations;  // in the workspace
};

void LayoutPlanes(const Job& job, std::int64_t item) {
  const Weights& w = job.weights;
  const Plan& plan = job.plan;
  const ConvGeometry& g = w.geometry;
  const std::int64_t groups = ChannelGroups(w);
  const std::int64_t items = DivideUp(groups, plan.layout_rows);
  const std::int64_t image = item / items;
  const std::int64_t begin = item % items * plan.layout_rows;
  const std::int64_t channels = g.in_channels / g.group;
  InterleaveCall call;
  call.channel_stride = plan.in_size[0] * plan.in_size[1];
  for (int axis = 0; axis < 2; ++axis) {
    call.size[axis] = plan.in_size[axis];
    call.pad_begin[axis] = g.pad_begin[axis];
  }
  call.plane_size[0] = plan.padded_size[0];
  call.plane_size[1] = plan.out_size[1];
  if (g.kernel[1] == 1 && plan.padded_size[1] == plan.in_size[1] && plan.padded_size[0] == plan.in_size[0]) {
    // Rows follow one another: they are one.
    call.size[1] *= call.size[0];
    call.plane_size[1] = call.size[1];
    call.size[0] = call.plane_size[0] = 1;
  }
  call.copies = g.kernel[1];
  call.dilation = g.dilation[1];
  call.plane_bytes = PlaneBytes(plan);
  call.zero_point = static_cast<std::uint8_t>(job.requantizer.x_zero_point);
  call.flip = job.requantizer.x_flip;
  for (std::int64_t group = begin; group < std::min(begin + plan.layout_rows, groups); ++group) {
    const std::int64_t first = group * kPlanarChannels;
    call.channels = static_cast<int>(std::min<std::int64_t>(channels - first, kPlanarChannels));
    call.x = job.x + (image * channels + first) * call.channel_stride;
    call.out = job.activations + image * ImageBytes(w, plan) + group * call.copies * call.plane_bytes;
    w.table->interleave(call);
  }
}

void ComputePlanar(const Job& job, std::int64_t item) {
  const Weights& w = job.weights;
  const Plan& plan = job.plan;
  const ConvGeometry& g = w.geometry;
  const std::int64_t pixels = plan.out_size[0] * plan.out_size[1];
  const std::int64_t tile_items = DivideUp(w.group_panels, plan.panels_per_item);
  const std::int64_t parts = DivideUp(pixels, plan.rows_per_item);
  const std::int64_t first_tile = item % tile_items * plan.panels_per_item;
  const std::int64_t last_tile = std::min(first_tile + plan.panels_per_item, w.group_panels);
  const std::int64_t first = item / tile_items % parts * plan.rows_per_item;
  const std::int64_t image = item / tile_items / parts;
  const std::int64_t group = image % g.group;
  PlanarCall call;
  call.planes = job.activations + image * ImageBytes(w, plan) + first * static_cast<std::int64_t>(kWord);
  call.pixels = std::min(plan.rows_per_item, pixels - first);
  call.kernel[0] = g.kernel[0];
  call.kernel[1] = g.kernel[1];
  call.tap_step[0] = g.dilation[0] * plan.out_size[1] * static_cast<std::int64_t>(kWord);
  call.tap_step[1] = PlaneBytes(plan);
  call.group_count = ChannelGroups(w);
  call.group_step = g.kernel[1] * PlaneBytes(plan);
  const std::int64_t tile = group * w.group_panels + first_tile;
  call.tiles = w.decoded.get() + tile * w.panel_bytes;
  call.tile_bytes = w.panel_bytes;
  call.start = job.requantizer.Start() + tile * kPlanarRows;
  call.factor = job.requantizer.Factor() + tile * kPlanarRows;
  call.numbers = job.requantizer.numbers;
  call.outputs = std::min(last_tile * kPlanarRows, w.group_outputs) - first_tile * kPlanarRows;
  const std::int64_t channel = image / g.group * g.out_channels + group * w.group_outputs + first_tile * kPlanarRows;
  call.y = job.y + channel * pixels + first;
  call.y_stride = pixels;
  w.table->planar(call);
}

}  // namespace
}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_RUN_PLANAR_H_
