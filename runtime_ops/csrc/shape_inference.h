// What an operator can tell about the shape of its outputs before it runs.
//
// Inference never fails: what it cannot derive, or what contradicts the operator's contract, stays unknown, and the
// kernel reports it with a sentence when it sees the values.
#ifndef POSTQUANT_CSRC_SHAPE_INFERENCE_H_
#define POSTQUANT_CSRC_SHAPE_INFERENCE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ort_abi.h"

namespace postquant {

// An axis of known size, or of a size known by name, or unknown.
struct Axis {
  std::int64_t size = -1;
  const char* symbol = "";  // belongs to onnxruntime
};

class ShapeInference {
 public:
  ShapeInference(const OrtApi* api, OrtShapeInferContext* context) : api_(api), context_(context) {}

  // Whether the rank of `input` is known, and its axes.
  bool Input(std::size_t input, std::vector<Axis>* out) const;
  // Element type of `input`, 0 if unknown. onnxruntime asks ONE operator of all that share a name and differ in their
  // types, so an output that has the type of an input must take it from here.
  int Type(std::size_t input) const;
  // Whether the attribute is there, and its integers.
  bool Ints(const char* name, std::vector<std::int64_t>* out) const;
  // Nothing is told about an output of type 0.
  void SetOutput(std::size_t output, int type, const std::vector<Axis>& axes) const;

 private:
  const abi::ShapeInfo* Info(std::size_t input) const;
  bool Succeeded(OrtStatus* status) const;

  const OrtApi* api_;
  OrtShapeInferContext* context_;
};

}  // namespace postquant

#endif  // POSTQUANT_CSRC_SHAPE_INFERENCE_H_
