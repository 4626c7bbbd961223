// Turns a kernel class into an OrtCustomOp: the boundary that no exception crosses.
//
// A kernel class has
//   static const Signature& GetSignature();
//   explicit Kernel(const NodeInfo& info);              // reads and checks attributes, takes constants
//   const Identity& identity() const;
//   void Compute(const Run& run);                       // several threads may be in it at a time
//   static void InferShapes(const ShapeInference&);
// and may throw from all of them.
#ifndef POSTQUANT_CSRC_CUSTOM_OP_H_
#define POSTQUANT_CSRC_CUSTOM_OP_H_

#include <exception>
#include <memory>
#include <new>
#include <string>

#include "node.h"
#include "ort_abi.h"
#include "shape_inference.h"

namespace postquant {

// Runs `body`; what it throws becomes a status. Null for success.
template <typename Body>
OrtStatus* Guarded(const OrtApi* api, const char* op, const Body& body) noexcept {
  const auto failed = [api](int code, const char* sentence) { return abi::CreateStatus::Call(api, code, sentence); };
  try {
    try {
      body();
      return nullptr;
    } catch (const OperatorError& error) {
      const std::string text = error.what();
      const bool named = text.rfind(op, 0) == 0;
      return failed(abi::kInvalidArgument, (named ? text : std::string(op) + ": " + text).c_str());
    } catch (const std::bad_alloc&) {
      return failed(abi::kFail, (std::string(op) + ": out of memory.").c_str());
    } catch (const std::exception& error) {
      return failed(abi::kFail, (std::string(op) + ": " + error.what() + ".").c_str());
    }
  } catch (...) {  // no memory left even for the sentence
    return failed(abi::kFail, "ai.postquant: out of memory.");
  }
}

template <typename Kernel>
class CustomOp : public OrtCustomOp {
 public:
  explicit CustomOp(const OrtApi* api) : OrtCustomOp{}, api_(api) {
    version = abi::kApiVersion;
    GetName = [](const OrtCustomOp*) { return Kernel::GetSignature().name; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
    GetInputType = [](const OrtCustomOp*, std::size_t i) -> int { return Kernel::GetSignature().inputs[i].type; };
    GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::GetSignature().inputs.size(); };
    GetOutputType = [](const OrtCustomOp*, std::size_t i) -> int { return Kernel::GetSignature().outputs[i].type; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return Kernel::GetSignature().outputs.size(); };
    GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return abi::kRequired; };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return abi::kRequired; };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return abi::kDefaultMemory; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = &Create;
    KernelComputeV2 = &Compute;
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    InferOutputShapeFn = &Infer;
  }

 private:
  static OrtStatus* Create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    *kernel = nullptr;
    return Guarded(api, Kernel::GetSignature().name, [&] {
      *kernel = std::make_unique<Kernel>(NodeInfo(api, Kernel::GetSignature(), info)).release();
    });
  }

  static OrtStatus* Compute(void* opaque, OrtKernelContext* context) {
    Kernel& kernel = *static_cast<Kernel*>(opaque);
    const Identity& identity = kernel.identity();
    return Guarded(identity.api, identity.signature->name, [&] { kernel.Compute(Run(identity, context)); });
  }

  static OrtStatus* Infer(const OrtCustomOp* op, OrtShapeInferContext* context) {
    const OrtApi* const api = static_cast<const CustomOp*>(op)->api_;
    return Guarded(api, Kernel::GetSignature().name, [&] { Kernel::InferShapes(ShapeInference(api, context)); });
  }

  const OrtApi* api_;
};

}  // namespace postquant

#endif  // POSTQUANT_CSRC_CUSTOM_OP_H_
