// Integer matrix products and convolutions whose weights are packed codes and a look-up table of int8 levels.
//
//     sum[n] = bias[n] + sum over k of (x[k] - x_zero_point) * table[code[n, k]]        (int32, wraps around)
//     y[n]   = saturate(round_half_even(float(sum[n]) * ((x_scale * w_scale[n]) / y_scale)) + y_zero_point)
//
// or, for a matrix product with a float output, without the integer bias,
//
//     y[n]   = float(sum[n]) * (x_scale * w_scale[n]) + float_bias[n]
//
// Padding of a convolution contributes 0. Float expressions are evaluated in float32, operation by operation, as
// onnxruntime's integer kernels do; the result is the same to the bit on every instruction set.
//
// How it is used (nothing here knows onnxruntime; nothing here throws or makes threads):
//
//     load:   PrepareMatMul / PrepareConv      codes -> Weights, in the layout of the chosen instruction set
//             PrepareRequantizer               scales, zero points, bias -> per output numbers (again if they change)
//     run:    PlanMatMul / PlanConv            sizes -> Plan: phases, items, workspace
//             for each phase in order:         Run(..., phase, begin, end, ...) for any partition of [0, items)
//                                              on any threads; a phase starts when the one before it is complete
//
// All objects are immutable once made and may be shared between threads; x, y and the workspace belong to one run.
#ifndef POSTQUANT_CSRC_LUT_KERNELS_H_
#define POSTQUANT_CSRC_LUT_KERNELS_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "isa.h"

namespace postquant::lut {

enum class Status {
  kOk,
  kOutOfMemory,
  kBadShape,    // a size is negative, a stride is 0, the kernel is larger than the padded input, a product overflows
  kBadNumbers,  // a multiplier, x_scale * w_scale[n] or that / y_scale, is not a finite number
};

// Packed codes: one row per output, element 0 in the lowest bits of byte 0 of its row, rows start at whole bytes.
struct Codes {
  const std::uint8_t* data;  // [outputs, ceil(K * bits / 8)]
  int bits;                  // 2 or 4
  const std::int8_t* table;  // [2 ** bits]
};

// A convolution over one or two spatial axes, NCHW. For one axis the first of each pair is 1 (kernel, stride,
// dilation) or 0 (pads). K of an output is in_channels / group * kernel[0] * kernel[1], in this order.
struct ConvGeometry {
  std::int64_t out_channels;
  std::int64_t in_channels;
  std::int64_t group;  // divides both
  std::int64_t kernel[2];
  std::int64_t stride[2];
  std::int64_t dilation[2];
  std::int64_t pad_begin[2];
  std::int64_t pad_end[2];
};

// The numbers around the sums. Scales are > 0 and finite. Zero points are in the range of their type.
struct Numbers {
  float x_scale;
  std::int32_t x_zero_point;
  bool x_signed;  // int8 instead of uint8
  float y_scale;
  std::int32_t y_zero_point;
  bool y_signed;
  const float* w_scale;      // [outputs]
  const std::int32_t* bias;  // [outputs]
  // Not null: the output is float, this is its bias, [outputs], finite, and neither `bias` nor what is known of y is
  // read. Matrix products only.
  const float* float_bias = nullptr;
};

class Weights;      // opaque
class Requantizer;  // opaque

struct Release {
  void operator()(Weights* weights) const noexcept;
  void operator()(Requantizer* requantizer) const noexcept;
};
using WeightsPtr = std::unique_ptr<Weights, Release>;
using RequantizerPtr = std::unique_ptr<Requantizer, Release>;

constexpr int kPhases = 2;

// What one call needs. Plain data; valid for the Weights and Requantizer it was made from.
struct Plan {
  std::int64_t items[kPhases];   // how many work items each phase has; 0: skip the phase
  double cost[kPhases];          // about how many nanoseconds one item takes on one core
  std::size_t workspace;         // bytes that Run needs, no alignment asked for; 0: the pointer may be null
  std::int64_t rows;             // matrix product: rows. Convolution: samples
  std::int64_t in_size[2];       // convolution: input height and width
  std::int64_t out_size[2];      // convolution: output height and width
  std::int64_t padded_size[2];   // convolution: height and width of the padded copy
  std::int64_t layout_rows;      // rows (planar: groups of four channels) that an item of phase 0 lays out
  std::int64_t rows_per_item;    // rows or output pixels, in phase 1
  std::int64_t panels_per_item;  // panels, tiles or (depthwise) channels, in phase 1
};

// Weights of a matrix product: codes of [outputs, inputs].
// The codes stay packed; the first run with more than a few rows also keeps them decoded, which is faster.
// `isa` null: the best set of this machine, or the one named in the environment (see isa.h).
Status PrepareMatMul(const Codes& codes, std::int64_t outputs, std::int64_t inputs, const Isa* isa, WeightsPtr* out);

// Weights of a convolution: codes of [out_channels, K]. They are decoded here, once.
Status PrepareConv(const Codes& codes, const ConvGeometry& geometry, const Isa* isa, WeightsPtr* out);

// Per output numbers. Nothing of `numbers` is kept. kBadShape for a convolution with a float output.
Status PrepareRequantizer(const Weights& weights, const Numbers& numbers, RequantizerPtr* out);

// Plans a product of x [rows, inputs] giving y [rows, outputs]; higher ranks are flattened by the caller.
Status PlanMatMul(const Weights& weights, const Requantizer& requantizer, std::int64_t rows, Plan* plan);

// Plans a convolution of x [batch, in_channels, height, width] giving y [batch, out_channels, *plan.out_size].
Status PlanConv(const Weights& weights, const Requantizer& requantizer, std::int64_t batch, std::int64_t height,
                std::int64_t width, Plan* plan);

// Does items [begin, end) of `phase`. x and y are uint8, int8 or (y) float as `Numbers` said, dense, row-major.
void Run(const Weights& weights, const Requantizer& requantizer, const Plan& plan, int phase, std::int64_t begin,
         std::int64_t end, const void* x, void* y, void* workspace) noexcept;

}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_KERNELS_H_
