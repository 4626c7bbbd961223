// The part of onnxruntime's C ABI that this library uses, declared here so that the build needs no onnxruntime headers.
//
// The ABI is stable by contract: OrtApi is an append-only table of function pointers and OrtCustomOp an append-only
// struct that states its own version. A function is therefore named by its position in the table, which is the same in
// every version since the one that appended it. We ask for version 17 (onnxruntime 1.17) and use nothing younger.
#ifndef POSTQUANT_CSRC_ORT_ABI_H_
#define POSTQUANT_CSRC_ORT_ABI_H_

#include <cstddef>
#include <cstdint>

extern "C" {

// Opaque to us. A status pointer is null for success.
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtOpAttr;
struct OrtValue;

struct OrtApi;

// Enumerations are passed as int. Every function is a C function that does not throw.
struct OrtCustomOp {
  std::uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info);
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  int (*GetInputType)(const OrtCustomOp* op, std::size_t index);
  std::size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  int (*GetOutputType)(const OrtCustomOp* op, std::size_t index);
  std::size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  void (*KernelCompute)(void* kernel, OrtKernelContext* context);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp* op, std::size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp* op, std::size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp* op, std::size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext* context);
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
};

}  // extern "C"

namespace postquant::abi {

constexpr std::uint32_t kApiVersion = 17;

// ONNXTensorElementDataType, OrtErrorCode, OrtOpAttrType, OrtCustomOpInputOutputCharacteristic, OrtMemType.
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum AttributeType : int { kAttributeInt = 1, kAttributeInts = 2 };
constexpr int kRequired = 0;
constexpr int kDefaultMemory = 0;

using AnyFunction = void (*)();
constexpr std::size_t kSlotsUsed = 275;  // the highest position + 1

}  // namespace postquant::abi

extern "C" {

// The real table is longer; only its beginning is declared.
struct OrtApi {
  postquant::abi::AnyFunction slots[postquant::abi::kSlotsUsed];
};

struct OrtApiBase {
  // Null when the running onnxruntime is older than `version`.
  const OrtApi* (*GetApi)(std::uint32_t version);
  const char* (*GetVersionString)();
};

}  // extern "C"

namespace postquant::abi {

// A function of OrtApi: its position, counted from 0, and its signature.
template <std::size_t kSlot, typename Signature>
struct Entry {
  static_assert(kSlot < kSlotsUsed);

  template <typename... Arguments>
  static auto Call(const OrtApi* api, Arguments... arguments) {
    return reinterpret_cast<Signature*>(api->slots[kSlot])(arguments...);
  }
};

using Task = void (*)(void* user, std::size_t index);
using ShapeInfo = OrtTensorTypeAndShapeInfo;

using CreateStatus = Entry<0, OrtStatus*(int code, const char* message)>;
using GetErrorMessage = Entry<2, const char*(const OrtStatus*)>;
using CreateCustomOpDomain = Entry<26, OrtStatus*(const char* domain, OrtCustomOpDomain** out)>;
using CustomOpDomainAdd = Entry<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Entry<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Entry<51, OrtStatus*(OrtValue*, void** out)>;
using CreateTensorTypeAndShapeInfo = Entry<57, OrtStatus*(ShapeInfo** out)>;
using SetTensorElementType = Entry<58, OrtStatus*(ShapeInfo*, int type)>;
using SetDimensions = Entry<59, OrtStatus*(ShapeInfo*, const std::int64_t* dims, std::size_t rank)>;
using GetTensorElementType = Entry<60, OrtStatus*(const ShapeInfo*, int* out)>;
using GetDimensionsCount = Entry<61, OrtStatus*(const ShapeInfo*, std::size_t* rank)>;
using GetDimensions = Entry<62, OrtStatus*(const ShapeInfo*, std::int64_t* dims, std::size_t rank)>;
using GetSymbolicDimensions = Entry<63, OrtStatus*(const ShapeInfo*, const char** names, std::size_t rank)>;
using GetTensorTypeAndShape = Entry<65, OrtStatus*(const OrtValue*, ShapeInfo** out)>;
using GetFloatAttribute = Entry<85, OrtStatus*(const OrtKernelInfo*, const char* name, float* out)>;
using GetIntAttribute = Entry<86, OrtStatus*(const OrtKernelInfo*, const char* name, std::int64_t* out)>;
// With a null `out` it returns the length only, which counts the final 0.
using GetStringAttribute =
    Entry<87, OrtStatus*(const OrtKernelInfo*, const char* name, char* out, std::size_t* size)>;
using GetInput = Entry<90, OrtStatus*(const OrtKernelContext*, std::size_t index, const OrtValue** out)>;
using GetOutput =
    Entry<91, OrtStatus*(OrtKernelContext*, std::size_t index, const std::int64_t* dims, std::size_t rank, OrtValue**)>;
using ReleaseStatus = Entry<93, void(OrtStatus*)>;
using ReleaseTensorTypeAndShapeInfo = Entry<99, void(ShapeInfo*)>;
// With a null `out` it returns the number of elements only.
using GetIntsAttribute =
    Entry<163, OrtStatus*(const OrtKernelInfo*, const char* name, std::int64_t* out, std::size_t* size)>;
// `size` counts the final 0.
using GetNodeName = Entry<244, OrtStatus*(const OrtKernelInfo*, char* out, std::size_t* size)>;
using GetConstantInput =
    Entry<249, OrtStatus*(const OrtKernelInfo*, std::size_t index, int* is_constant, const OrtValue** out)>;
using ShapeInputCount = Entry<267, OrtStatus*(const OrtShapeInferContext*, std::size_t* out)>;
// The result belongs to the context.
using ShapeInput = Entry<268, OrtStatus*(const OrtShapeInferContext*, std::size_t index, ShapeInfo** out)>;
using ShapeAttribute = Entry<269, OrtStatus*(const OrtShapeInferContext*, const char* name, const OrtOpAttr** out)>;
using SetShapeOutput = Entry<270, OrtStatus*(const OrtShapeInferContext*, std::size_t index, const ShapeInfo*)>;
using SetSymbolicDimensions = Entry<271, OrtStatus*(ShapeInfo*, const char** names, std::size_t rank)>;
// `length` and `size` are bytes; too small a buffer is a failure that sets `size`.
using ReadAttribute =
    Entry<272, OrtStatus*(const OrtOpAttr*, int type, void* data, std::size_t length, std::size_t* size)>;
// Calls task(user, 0..total-1) on onnxruntime's own threads; `batches` of 0 lets it choose.
using ParallelFor =
    Entry<274, OrtStatus*(const OrtKernelContext*, Task task, std::size_t total, std::size_t batches, void* user)>;

}  // namespace postquant::abi

#endif  // POSTQUANT_CSRC_ORT_ABI_H_
