// What Weights and Requantizer hold; shared by the files that make, plan and run.
#ifndef POSTQUANT_CSRC_LUT_WEIGHTS_H_
#define POSTQUANT_CSRC_LUT_WEIGHTS_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>

#include "lut_kernels.h"
#include "lut_planar.h"
#include "lut_table.h"

namespace postquant::lut {

constexpr std::size_t kAlignment = 64;

struct FreeAligned {
  void operator()(std::uint8_t* p) const noexcept;
};
using Bytes = std::unique_ptr<std::uint8_t[], FreeAligned>;

// Zeros, or null when memory is out or the size is negative.
Bytes AllocateZeros(std::int64_t size) noexcept;

inline std::int64_t DivideUp(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t RoundUp(std::int64_t a, std::int64_t b) { return DivideUp(a, b) * b; }

// *product = a * b for numbers >= 0; false if it does not fit in 62 bits (so that sums of two cannot overflow).
inline bool Multiply(std::int64_t a, std::int64_t b, std::int64_t* product) {
  constexpr std::int64_t kLimit = std::int64_t{1} << 62;
  if (a < 0 || b < 0 || (a != 0 && b > kLimit / a)) {
    return false;
  }
  *product = a * b;
  return true;
}

enum class Method { kMatMul, kConv, kPlanar, kDepthwise };

class Weights {
 public:
  Method method;
  const KernelTable* table;
  ConvGeometry geometry;  // of a matrix product: 1 x 1
  std::int64_t outputs;   // in all groups
  std::int64_t inputs;    // K: elements of an output

  // Elements of an output are met in runs[0] * runs[1] runs of contiguous activations.
  std::int64_t runs[2];
  std::int64_t run_elements;
  std::int64_t group_outputs;
  std::int64_t group_panels;    // kPlanar: tiles
  std::int64_t panel_bytes;     // of decoded weights
  std::int64_t packed_steps;    // of packed codes
  std::int64_t packed_bytes;    // of a panel of packed codes

  int bits;
  std::int8_t levels[kLevels];
  Bytes code_sums;  // int32 [outputs]: sums of levels
  Bytes packed;     // [panels][packed_bytes], matrix product only
  Bytes taps;       // depthwise only: int8 [outputs][kernel[0]][kernel[1] rounded up to 4]

  // [groups][group_panels][panel_bytes]; made at first use for a matrix product that has packed codes.
  mutable Bytes decoded;
  mutable std::mutex decoding;

  const std::int32_t* CodeSums() const { return reinterpret_cast<const std::int32_t*>(code_sums.get()); }
  std::int64_t WordElements() const { return static_cast<std::int64_t>(kWord) / ElementBytes(*table); }
  // Outputs of a panel.
  std::int64_t Width() const { return method == Method::kPlanar ? kPlanarRows : table->panel_width; }
  std::int64_t CodesPerStep() const { return WordElements() * (8 / bits); }
};

// The steps of preparation, for Weights whose method, table, geometry and runs are set; in this order.
void SetLevels(const Codes& codes, Weights* weights);
bool SetSizes(Weights* weights);  // false: sizes overflow
Status SetCodeSums(const Codes& codes, Weights* weights);
Status Pack(const Codes& codes, Weights* weights);
Status Decode(const Codes& codes, Weights* weights);
Status SetTaps(const Codes& codes, Weights* weights);

// Decodes packed codes unless that is done.
Status EnsureDecoded(const Weights& weights);

class Requantizer {
 public:
  // One number for each place of each panel (depthwise: for each output), so that kernels can read whole registers.
  Bytes start;   // int32: bias without what the zero point of the activations adds
  Bytes factor;  // float
  Bytes bias;    // float, of a float output; else null
  OutputNumbers numbers;
  std::int32_t x_zero_point;  // LayoutCall::zero_point
  std::uint8_t x_flip;        // LayoutCall::flip

  std::int32_t* Start() const { return reinterpret_cast<std::int32_t*>(start.get()); }
  float* Factor() const { return reinterpret_cast<float*>(factor.get()); }
  float* Bias() const { return reinterpret_cast<float*>(bias.get()); }
};

// Where a matrix product reads its rows.
struct MatMulRows {
  bool few;             // straight from packed codes
  bool in_place;        // rows are read where they are
  std::int64_t padded;  // elements of a row in the workspace
};
MatMulRows RowsOf(const Weights& weights, const Requantizer& requantizer, std::int64_t rows);

// Groups of four channels of one image of a planar convolution, and bytes of a plane.
std::int64_t ChannelGroups(const Weights& weights);
std::int64_t PlaneBytes(const Plan& plan);

// Bytes of the padded image of one group in the workspace of a convolution.
std::int64_t ImageBytes(const Weights& weights, const Plan& plan);

}  // namespace postquant::lut

#endif  // POSTQUANT_CSRC_LUT_WEIGHTS_H_
