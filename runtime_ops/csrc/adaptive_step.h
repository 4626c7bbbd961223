// The step of a sample from its pooled statistics: what AdaptiveQuantize and AdaptiveRequantize share.
//
//     beta = clip(w2 relu(w1 f + b1) + b2, beta_min, beta_max)        step_out = step * beta
//
// Statistics and network are float64, beta is float32.
#ifndef POSTQUANT_CSRC_ADAPTIVE_STEP_H_
#define POSTQUANT_CSRC_ADAPTIVE_STEP_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "node.h"
#include "quantize_kernels.h"
#include "side_inputs.h"

namespace postquant {

class AdaptiveStep {
 public:
  // `network` is the position of input `step`; zero_point, w1, b1, w2 and b2 follow.
  AdaptiveStep(const NodeInfo& info, std::size_t network);

  bool wants_squares() const { return (features_ & 2) != 0; }
  bool wants_largest() const { return (features_ & 4) != 0; }
  // Checks shapes and values; `inputs` are all side inputs.
  void Validate(const Identity& identity, const Tensors& inputs) const;
  // Checks that w1 has a column for each statistic of a sample of `channels` channels.
  void ValidateChannels(const Identity& identity, const Tensors& inputs, std::int64_t channels) const;
  // The step of one sample: `moments` of its channels, `points` elements each, in units of `unit`. `scratch` is
  // resized as needed.
  float Step(const Tensors& inputs, const quantize::Moments* moments, std::size_t channels, std::size_t points,
             double unit, std::vector<double>* scratch) const;
  quantize::CodeRange Range(const Tensors& inputs) const;

 private:
  std::size_t FeatureCount(std::size_t channels) const;

  std::size_t network_;
  std::int64_t features_;
  float beta_min_;
  float beta_max_;
  std::int32_t qmin_;
  std::int32_t qmax_;
};

// Attributes qmin and qmax: 0 <= qmin < qmax <= 255.
void ReadCodeRange(const NodeInfo& info, std::int32_t* qmin, std::int32_t* qmax);

}  // namespace postquant

#endif  // POSTQUANT_CSRC_ADAPTIVE_STEP_H_
