// The inputs beside the activation: constants of the graph are read once, when the kernel is made, others on every run.
#ifndef POSTQUANT_CSRC_SIDE_INPUTS_H_
#define POSTQUANT_CSRC_SIDE_INPUTS_H_

#include <array>
#include <cstddef>

#include "node.h"

namespace postquant {

constexpr std::size_t kMostInputs = 11;

// Indexed as the operator's inputs; entries below the first side input are empty.
using Tensors = std::array<Tensor, kMostInputs>;

class SideInputs {
 public:
  // Takes the constants among inputs `first` to the last one of the signature. Their memory lives as long as the
  // session.
  SideInputs(const NodeInfo& info, std::size_t first);

  bool constant(std::size_t input) const { return constant_[input]; }
  bool all_constant() const { return all_constant_; }
  const Tensors& constants() const { return tensors_; }
  // All side inputs of a run.
  Tensors Read(const Run& run) const;

 private:
  std::size_t first_;
  std::size_t count_;
  Tensors tensors_;
  std::array<bool, kMostInputs> constant_{};
  bool all_constant_ = true;
};

}  // namespace postquant

#endif  // POSTQUANT_CSRC_SIDE_INPUTS_H_
