// The operators of ai.postquant version 1, in the order of their registration. Each op_*.cc defines one.
#ifndef POSTQUANT_CSRC_OPERATORS_H_
#define POSTQUANT_CSRC_OPERATORS_H_

#include <memory>
#include <vector>

#include "custom_op.h"
#include "ort_abi.h"

namespace postquant {

// One entry per combination of element types: onnxruntime merges those of one name into one schema. Shared pointers
// destroy what was made; OrtCustomOp itself has no virtual destructor.
using OperatorList = std::vector<std::shared_ptr<OrtCustomOp>>;

void AddLutQLinearConv(const OrtApi* api, OperatorList* list);
void AddLutQLinearMatMul(const OrtApi* api, OperatorList* list);
void AddLutMatMulIntegerToFloat(const OrtApi* api, OperatorList* list);
void AddAdaptiveQuantize(const OrtApi* api, OperatorList* list);
void AddAdaptiveRequantize(const OrtApi* api, OperatorList* list);
void AddBorderQuantize(const OrtApi* api, OperatorList* list);
void AddLutRequantize(const OrtApi* api, OperatorList* list);
void AddFeedbackRequantize(const OrtApi* api, OperatorList* list);

}  // namespace postquant

#endif  // POSTQUANT_CSRC_OPERATORS_H_
