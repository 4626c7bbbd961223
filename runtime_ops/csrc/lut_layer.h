// What the operators with packed weights share: inputs 1 to 8, and running a plan on onnxruntime's threads.
//
// Inputs that are constants of the graph are checked and prepared once, when the kernel is made. Others are read on
// every run; weights that hold the same bytes as those of the run before are not prepared again.
#ifndef POSTQUANT_CSRC_LUT_LAYER_H_
#define POSTQUANT_CSRC_LUT_LAYER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "lut_kernels.h"
#include "node.h"
#include "side_inputs.h"

namespace postquant {

// Inputs, in order; 0 is the activation. A float output ends with kBias.
enum LutInput : std::size_t {
  kX,
  kXScale,
  kXZeroPoint,
  kCodes,
  kTable,
  kWScale,
  kBias,
  kYScale,
  kYZeroPoint,
};

// `T` is the type of the activation, `Y` that of the output: T, or float, which has no kYScale and no kYZeroPoint and
// whose bias is float.
template <typename T, typename Y>
Signature LutSignature(const char* name, const char* x);

// Attribute bits: 2 or 4.
int LutBits(const NodeInfo& info);

class LutLayer {
 public:
  using Prepare = std::function<lut::Status(const lut::Codes& codes, lut::WeightsPtr* out)>;

  struct Ready {
    std::shared_ptr<const lut::Weights> weights;
    std::shared_ptr<const lut::Requantizer> requantizer;
  };

  // A weight of `outputs` rows of `terms` codes, which `prepare` turns into the kernels' layout.
  LutLayer(const NodeInfo& info, int bits, std::int64_t outputs, std::int64_t terms, Prepare prepare);

  const Identity& identity() const { return identity_; }
  Ready Acquire(const Run& run);
  // Runs the phases of `plan`.
  void Execute(const Run& run, const Ready& ready, const lut::Plan& plan, const void* x, void* y) const;
  // Throws unless the status is kOk; `input` says what was planned.
  void Check(lut::Status status, const Shape& input) const;

 private:
  std::size_t input_count() const { return identity_.signature->inputs.size(); }
  bool float_output() const { return identity_.signature->outputs[0].type == abi::kFloat; }
  void Validate(const Tensor& tensor, std::size_t input) const;
  std::shared_ptr<const lut::Weights> MakeWeights(const Tensor& codes, const Tensor& table) const;
  std::shared_ptr<const lut::Requantizer> MakeRequantizer(const lut::Weights& weights, const Tensors& inputs) const;
  std::shared_ptr<const lut::Weights> CachedWeights(const Tensor& codes, const Tensor& table);

  Identity identity_;
  int bits_;
  std::int64_t outputs_;
  std::int64_t terms_;
  Prepare prepare_;
  SideInputs inputs_;
  Ready ready_;       // what follows from constants only; may be null

  std::mutex mutex_;  // of the two members below
  std::vector<std::uint8_t> cached_bytes_;
  std::shared_ptr<const lut::Weights> cached_;
};

}  // namespace postquant

#endif  // POSTQUANT_CSRC_LUT_LAYER_H_
