// A plain C door to lut_kernels.h for tests: every step on one thread. Not part of the operator library.
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "lut_kernels.h"

#if defined(_WIN32)
#define POSTQUANT_EXPORT __declspec(dllexport)
#else
#define POSTQUANT_EXPORT __attribute__((visibility("default")))
#endif

namespace {

using postquant::Isa;
using namespace postquant::lut;  // NOLINT: the door is to all of it

// A prepared layer.
struct Layer {
  WeightsPtr weights;
  RequantizerPtr requantizer;
  bool matmul;
};

struct FreeMemory {
  void operator()(void* p) const noexcept { std::free(p); }
};

}  // namespace

extern "C" {

POSTQUANT_EXPORT int lut_isa_available(int isa) { return postquant::IsaAvailable(static_cast<Isa>(isa)) ? 1 : 0; }

POSTQUANT_EXPORT const char* lut_isa_name(int isa) { return postquant::IsaName(static_cast<Isa>(isa)); }

// The set in use, and why the environment's wish is not met, or null.
POSTQUANT_EXPORT int lut_isa_selected() { return static_cast<int>(postquant::SelectedIsa()); }
POSTQUANT_EXPORT const char* lut_isa_problem() { return postquant::IsaProblem(); }

// geometry: out_channels, in_channels, group, then pairs kernel, stride, dilation, pad_begin, pad_end; for a matrix
// product outputs and inputs. integers: x zero point, x signed, y zero point, y signed. float_bias: null, or that of a
// float output. Returns a Status.
POSTQUANT_EXPORT int lut_make(int isa, int matmul, const std::int64_t* geometry, const std::uint8_t* codes, int bits,
                              const std::int8_t* table, const float* w_scale, const std::int32_t* bias, float x_scale,
                              float y_scale, const std::int32_t* integers, const float* float_bias, void** out) {
  const Isa wanted = static_cast<Isa>(isa);
  std::unique_ptr<Layer> layer(new (std::nothrow) Layer());
  if (!layer) {
    return static_cast<int>(Status::kOutOfMemory);
  }
  layer->matmul = matmul != 0;
  const Codes source = {codes, bits, table};
  Status status = Status::kOk;
  if (layer->matmul) {
    status = PrepareMatMul(source, geometry[0], geometry[1], &wanted, &layer->weights);
  } else {
    ConvGeometry g = {};
    g.out_channels = geometry[0];
    g.in_channels = geometry[1];
    g.group = geometry[2];
    for (int axis = 0; axis < 2; ++axis) {
      g.kernel[axis] = geometry[3 + axis];
      g.stride[axis] = geometry[5 + axis];
      g.dilation[axis] = geometry[7 + axis];
      g.pad_begin[axis] = geometry[9 + axis];
      g.pad_end[axis] = geometry[11 + axis];
    }
    status = PrepareConv(source, g, &wanted, &layer->weights);
  }
  if (status == Status::kOk) {
    const Numbers numbers = {x_scale,     integers[0],      integers[1] != 0, y_scale,   integers[2],
                             integers[3] != 0, w_scale,     bias,             float_bias};
    status = PrepareRequantizer(*layer->weights, numbers, &layer->requantizer);
  }
  if (status == Status::kOk) {
    *out = layer.release();
  }
  return static_cast<int>(status);
}

POSTQUANT_EXPORT void lut_free(void* layer) { delete static_cast<Layer*>(layer); }

// size: rows, or batch, height and width. Items of a phase run in reverse order where `backwards` is set, `repeat`
// times over. out_size receives the spatial size of the output of a convolution.
POSTQUANT_EXPORT int lut_run(const void* made, const std::int64_t* size, const void* x, void* y, std::int64_t* out_size,
                             int backwards, int repeat) {
  const Layer& layer = *static_cast<const Layer*>(made);
  Plan plan = {};
  const Status status = layer.matmul ? PlanMatMul(*layer.weights, *layer.requantizer, size[0], &plan)
                                     : PlanConv(*layer.weights, *layer.requantizer, size[0], size[1], size[2], &plan);
  if (status != Status::kOk) {
    return static_cast<int>(status);
  }
  out_size[0] = plan.out_size[0];
  out_size[1] = plan.out_size[1];
  if (y == nullptr) {
    return 0;
  }
  const std::unique_ptr<void, FreeMemory> workspace(std::malloc(plan.workspace + 1));
  if (!workspace) {
    return static_cast<int>(Status::kOutOfMemory);
  }
  for (int i = 0; i < repeat; ++i) {
    for (int phase = 0; phase < kPhases; ++phase) {
      const std::int64_t items = plan.items[phase];
      if (backwards == 0) {
        Run(*layer.weights, *layer.requantizer, plan, phase, 0, items, x, y, workspace.get());
      }
      for (std::int64_t item = backwards != 0 ? items : 0; item > 0; --item) {
        Run(*layer.weights, *layer.requantizer, plan, phase, item - 1, item, x, y, workspace.get());
      }
    }
  }
  return 0;
}

}  // extern "C"
