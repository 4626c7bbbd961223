#include "side_inputs.h"

namespace postquant {

SideInputs::SideInputs(const NodeInfo& info, std::size_t first)
    : first_(first), count_(info.identity().signature->inputs.size()) {
  for (std::size_t input = first_; input < count_; ++input) {
    constant_.at(input) = info.Constant(input, &tensors_.at(input));
    all_constant_ = all_constant_ && constant_[input];
  }
}

Tensors SideInputs::Read(const Run& run) const {
  Tensors tensors = tensors_;
  for (std::size_t input = first_; input < count_; ++input) {
    if (!constant_[input]) {
      tensors[input] = run.Input(input);
    }
  }
  return tensors;
}

}  // namespace postquant
