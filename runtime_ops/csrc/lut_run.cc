// Does the items of a plan.
#include <algorithm>

#include "lut_run_planar.h"
#include "lut_weights.h"

namespace postquant::lut {
namespace {

const std::uint8_t* Read(const void* p) { return static_cast<const std::uint8_t*>(p); }

std::uint8_t* Aligned(void* workspace) {
  const auto address = reinterpret_cast<std::uintptr_t>(workspace);
  const std::uintptr_t aligned = (address + kAlignment - 1) / kAlignment * kAlignment;
  return static_cast<std::uint8_t*>(workspace) + (aligned - address);
}

void LayoutMatMul(const Job& job, std::int64_t item) {
  const Weights& w = job.weights;
  const MatMulRows layout = RowsOf(w, job.requantizer, job.plan.rows);
  const std::int64_t end = std::min((item + 1) * job.plan.layout_rows, job.plan.rows);
  for (std::int64_t row = item * job.plan.layout_rows; row < end; ++row) {
    w.table->convert(job.x + row * w.inputs, w.inputs, layout.padded, job.requantizer.x_zero_point,
                     job.requantizer.x_flip, job.activations + row * layout.padded * ElementBytes(*w.table));
  }
}

RowOutput MatMulOutput(const Job& job, std::int64_t first_row, std::int64_t panel) {
  const Weights& w = job.weights;
  const Requantizer& r = job.requantizer;
  const std::int64_t width = w.table->panel_width;
  const std::int64_t first = panel * width;
  const std::int64_t element = r.bias == nullptr ? 1 : static_cast<std::int64_t>(sizeof(float));
  RowOutput out;
  out.start = r.Start() + first;
  out.factor = r.Factor() + first;
  out.bias = r.bias == nullptr ? nullptr : r.Bias() + first;
  out.numbers = r.numbers;
  out.outputs = static_cast<int>(std::min(width, w.outputs - first));
  out.y = job.y + (first_row * w.outputs + first) * element;
  out.y_stride = w.outputs;
  return out;
}

void ComputeFewRows(const Job& job, const MatMulRows& layout, std::int64_t panel) {
  const Weights& w = job.weights;
  GemvCall call;
  call.x = layout.in_place ? job.x : job.activations;
  call.x_stride = layout.in_place ? w.inputs : layout.padded * ElementBytes(*w.table);
  call.row_count = static_cast<int>(job.plan.rows);
  call.packed = w.packed.get() + panel * w.packed_bytes;
  call.steps = w.packed_steps;
  call.bits = w.bits;
  call.levels = w.levels;
  call.out = MatMulOutput(job, 0, panel);
  w.table->gemv(call);
}

void ComputeMatMul(const Job& job, std::int64_t item) {
  const Weights& w = job.weights;
  const MatMulRows layout = RowsOf(w, job.requantizer, job.plan.rows);
  const std::int64_t panel_items = DivideUp(w.group_panels, job.plan.panels_per_item);
  const std::int64_t first_row = item / panel_items * job.plan.rows_per_item;
  const std::int64_t first_panel = item % panel_items * job.plan.panels_per_item;
  const std::int64_t last_panel = std::min(first_panel + job.plan.panels_per_item, w.group_panels);
  if (layout.few) {
    for (std::int64_t panel = first_panel; panel < last_panel; ++panel) {
      ComputeFewRows(job, layout, panel);
    }
    return;
  }
  GemmCall call;
  const std::uint8_t* const x = layout.in_place ? job.x : job.activations;
  const std::int64_t stride = layout.in_place ? w.inputs : layout.padded * ElementBytes(*w.table);
  call.row_count = static_cast<int>(std::min(job.plan.rows_per_item, job.plan.rows - first_row));
  for (int r = 0; r < call.row_count; ++r) {
    call.rows[r] = x + (first_row + r) * stride;
  }
  call.runs[0] = call.runs[1] = 1;
  call.run_step[0] = call.run_step[1] = 0;
  call.run_bytes = w.inputs * ElementBytes(*w.table);
  for (std::int64_t panel = first_panel; panel < last_panel; ++panel) {
    call.panel = w.decoded.get() + panel * w.panel_bytes;
    call.out = MatMulOutput(job, first_row, panel);
    w.table->gemm(call);
  }
}

// The padded rows [begin, end) of the channels of one group of one sample.
void LayoutImage(const Job& job, std::int64_t image, std::int64_t begin, std::int64_t end) {
  const Weights& w = job.weights;
  const Plan& plan = job.plan;
  LayoutCall call;
  call.channels = w.geometry.in_channels / w.geometry.group;
  call.channel_stride = plan.in_size[0] * plan.in_size[1];
  call.x = job.x + image * call.channels * call.channel_stride;
  call.x_end = job.x + plan.rows * w.geometry.in_channels * call.channel_stride;
  for (int axis = 0; axis < 2; ++axis) {
    call.size[axis] = plan.in_size[axis];
    call.pad_begin[axis] = w.geometry.pad_begin[axis];
  }
  call.padded_width = plan.padded_size[1];
  call.row_begin = begin;
  call.row_end = end;
  call.zero_point = job.requantizer.x_zero_point;
  call.flip = job.requantizer.x_flip;
  call.out = job.activations + image * ImageBytes(w, plan);
  w.table->layout(call);
}

void LayoutConv(const Job& job, std::int64_t item) {
  const std::int64_t chunks = DivideUp(job.plan.padded_size[0], job.plan.layout_rows);
  const std::int64_t begin = item % chunks * job.plan.layout_rows;
  LayoutImage(job, item / chunks, begin, std::min(begin + job.plan.layout_rows, job.plan.padded_size[0]));
}

void ComputeConv(const Job& job, std::int64_t item) {
  const Weights& w = job.weights;
  const Plan& plan = job.plan;
  const ConvGeometry& g = w.geometry;
  const std::int64_t width = w.table->panel_width;
  const std::int64_t pixels = plan.out_size[0] * plan.out_size[1];
  const std::int64_t panel_items = DivideUp(w.group_panels, plan.panels_per_item);
  const std::int64_t blocks = DivideUp(pixels, plan.rows_per_item);
  const std::int64_t first_panel = item % panel_items * plan.panels_per_item;
  const std::int64_t last_panel = std::min(first_panel + plan.panels_per_item, w.group_panels);
  const std::int64_t first = item / panel_items % blocks * plan.rows_per_item;
  const std::int64_t image = item / panel_items / blocks;
  const std::int64_t pixel_bytes = g.in_channels / g.group * ElementBytes(*w.table);
  const std::int64_t row_bytes = plan.padded_size[1] * pixel_bytes;

  GemmCall call;
  call.row_count = static_cast<int>(std::min(plan.rows_per_item, pixels - first));
  std::int64_t oy = first / plan.out_size[1];
  std::int64_t ox = first % plan.out_size[1];
  const std::uint8_t* const base = job.activations + image * ImageBytes(w, plan);
  for (int r = 0; r < call.row_count; ++r) {
    call.rows[r] = base + oy * g.stride[0] * row_bytes + ox * g.stride[1] * pixel_bytes;
    if (++ox == plan.out_size[1]) {
      ox = 0;
      ++oy;
    }
  }
  call.runs[0] = w.runs[0];
  call.runs[1] = w.runs[1];
  call.run_step[0] = g.dilation[0] * row_bytes;
  call.run_step[1] = g.dilation[1] * pixel_bytes;
  call.run_bytes = w.run_elements * ElementBytes(*w.table);
  call.out.numbers = job.requantizer.numbers;
  call.out.bias = nullptr;

  // Panels give [pixel][channel]; the output is [channel][pixel]. Block transposition reads 16 columns at least.
  constexpr std::int64_t kMostWidth = 64;
  alignas(kAlignment) std::uint8_t tile[kMaxRows * kMostWidth];
  call.out.y = tile;
  call.out.y_stride = RoundUp(width, 16);
  const std::int64_t group = image % g.group;
  const std::int64_t sample = image / g.group;
  for (std::int64_t panel = first_panel; panel < last_panel; ++panel) {
    const std::int64_t place = (group * w.group_panels + panel) * width;
    call.panel = w.decoded.get() + (group * w.group_panels + panel) * w.panel_bytes;
    call.out.start = job.requantizer.Start() + place;
    call.out.factor = job.requantizer.Factor() + place;
    call.out.outputs = static_cast<int>(std::min(width, w.group_outputs - panel * width));
    w.table->gemm(call);
    const std::int64_t channel = sample * g.out_channels + group * w.group_outputs + panel * width;
    w.table->transpose(tile, call.out.y_stride, call.row_count, call.out.outputs, job.y + channel * pixels + first,
                       pixels);
  }
}

void ComputePlane(const Job& job, std::int64_t image) {
  const Weights& w = job.weights;
  const Plan& plan = job.plan;
  const ConvGeometry& g = w.geometry;
  LayoutImage(job, image, 0, plan.padded_size[0]);
  DepthwiseCall call;
  call.plane = job.activations + image * ImageBytes(w, plan);
  call.plane_width = plan.padded_size[1];
  for (int axis = 0; axis < 2; ++axis) {
    call.out_size[axis] = plan.out_size[axis];
    call.kernel[axis] = g.kernel[axis];
    call.stride[axis] = g.stride[axis];
    call.dilation[axis] = g.dilation[axis];
  }
  call.numbers = job.requantizer.numbers;
  const std::int64_t taps = g.kernel[0] * RoundUp(g.kernel[1], 4);
  for (std::int64_t m = 0; m < w.group_outputs; ++m) {
    const std::int64_t channel = image % g.group * w.group_outputs + m;
    call.taps = reinterpret_cast<const std::int8_t*>(w.taps.get()) + channel * taps;
    call.start = job.requantizer.Start()[channel];
    call.factor = job.requantizer.Factor()[channel];
    call.y = job.y + (image / g.group * g.out_channels + channel) * plan.out_size[0] * plan.out_size[1];
    w.table->depthwise(call);
  }
}

void ComputeDepthwise(const Job& job, std::int64_t item) {
  const Weights& w = job.weights;
  const Plan& plan = job.plan;
  const ConvGeometry& g = w.geometry;
  const std::int64_t begin = item * plan.panels_per_item;
  const std::int64_t end = std::min(begin + plan.panels_per_item, plan.rows * g.group);
  if (w.table->direct != nullptr && w.group_outputs == 1) {
    DirectCall call;
    call.x = job.x;
    call.x_bytes = plan.rows * g.group * plan.in_size[0] * plan.in_size[1];
    call.first = begin;
    call.count = end - begin;
    call.channels = g.group;
    for (int axis = 0; axis < 2; ++axis) {
      call.in_size[axis] = plan.in_size[axis];
      call.out_size[axis] = plan.out_size[axis];
      call.kernel[axis] = g.kernel[axis];
      call.stride[axis] = g.stride[axis];
      call.dilation[axis] = g.dilation[axis];
      call.pad_begin[axis] = g.pad_begin[axis];
    }
    call.zero_point = static_cast<std::uint8_t>(job.requantizer.x_zero_point);
    call.flip = job.requantizer.x_flip;
    call.taps = reinterpret_cast<const std::int8_t*>(w.taps.get());
    call.start = job.requantizer.Start();
    call.factor = job.requantizer.Factor();
    call.numbers = job.requantizer.numbers;
    call.y = job.y;
    if (w.table->direct(call)) {
      return;
    }
  }
  for (std::int64_t image = begin; image < end; ++image) {
    ComputePlane(job, image);
  }
}

using ItemFunction = void (*)(const Job& job, std::int64_t item);

ItemFunction FunctionOf(Method method, int phase) {
  switch (method) {
    case Method::kMatMul:
      return phase == 0 ? LayoutMatMul : ComputeMatMul;
    case Method::kConv:
      return phase == 0 ? LayoutConv : ComputeConv;
    case Method::kPlanar:
      return phase == 0 ? LayoutPlanes : ComputePlanar;
    default:
      return ComputeDepthwise;  // has one phase
  }
}

}  // namespace

void Run(const Weights& weights, const Requantizer& requantizer, const Plan& plan, int phase, std::int64_t begin,
         std::int64_t end, const void* x, void* y, void* workspace) noexcept {
  const Job job = {weights,  requantizer, plan, Read(x), static_cast<std::uint8_t*>(y),
                   workspace == nullptr ? nullptr : Aligned(workspace)};
  const ItemFunction function = FunctionOf(weights.method, phase);
  for (std::int64_t item = begin; item < end; ++item) {
    function(job, item);
  }
}

}  // namespace postquant::lut
