// The inputs of FeedbackRequantize beside x, checked and in the form that its kernel reads.
#ifndef POSTQUANT_CSRC_FEEDBACK_COEFFICIENTS_H_
#define POSTQUANT_CSRC_FEEDBACK_COEFFICIENTS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "level_maps.h"
#include "node.h"
#include "quantize_kernels.h"
#include "side_inputs.h"

namespace postquant {

enum FeedbackInput : std::size_t {
  kFeedbackGroup = kLevelInputs,
  kFeedbackLeft,
  kFeedbackLeftScale,
  kFeedbackRight,
  kFeedbackRightScale
};

class FeedbackCoefficients {
 public:
  // OperatorError if an input breaks its contract. The inputs must outlive this.
  FeedbackCoefficients(const Identity& identity, const quantize::Kernels& kernels, std::size_t cell,
                       const Tensors& inputs);

  FeedbackCoefficients(const FeedbackCoefficients&) = delete;
  FeedbackCoefficients& operator=(const FeedbackCoefficients&) = delete;

  const quantize::FeedbackPlan& plan() const { return plan_; }
  std::size_t largest_group() const { return largest_group_; }

 private:
  void SortChannels(const std::uint8_t* group);
  void MakeMaps(const Tensor& table);
  void MakeCodes(const quantize::Kernels& kernels, const Tensors& inputs);
  void MakeMatrices(const Tensors& inputs);

  quantize::FeedbackPlan plan_{};
  std::size_t largest_group_ = 0;
  std::vector<std::size_t> order_;
  std::vector<quantize::LevelMap> maps_;
  std::vector<std::int16_t> left_;
  std::vector<std::int16_t> right_;
  std::vector<float> right_scale_;
  LevelCodes codes_;
};

}  // namespace postquant

#endif  // POSTQUANT_CSRC_FEEDBACK_COEFFICIENTS_H_
