// A library with one operator for onnxruntime, as a user might bring it: example.ops::Cube, y = x * x * x, float32.
// Built by test_custom_ops.py; declares what it needs of onnxruntime's stable C ABI (OrtApi slots, OrtCustomOp 17).
#include <cstddef>
#include <cstdint>

struct OrtApi {
  void (*slots[100])();
};
struct OrtApiBase {
  const OrtApi* (*GetApi)(std::uint32_t version);
  const char* (*GetVersionString)();
};

namespace {

const OrtApi* g_api = nullptr;

template <typename... Arguments>
void* Call(std::size_t slot, Arguments... arguments) {
  return reinterpret_cast<void* (*)(Arguments...)>(g_api->slots[slot])(arguments...);
}

constexpr std::size_t kCreateDomain = 26, kDomainAdd = 27, kAddDomain = 28, kTensorData = 51, kRank = 61, kShape = 62,
                      kTypeAndShape = 65, kInput = 90, kOutput = 91, kReleaseInfo = 99;

void* Compute(void*, void* context) {
  void *x = nullptr, *y = nullptr, *info = nullptr, *from = nullptr, *to = nullptr;
  std::size_t rank = 0;
  std::int64_t shape[8] = {};
  Call(kInput, context, std::size_t{0}, &x);
  Call(kTypeAndShape, x, &info);
  Call(kRank, info, &rank);
  Call(kShape, info, static_cast<std::int64_t*>(shape), rank);
  reinterpret_cast<void (*)(void*)>(g_api->slots[kReleaseInfo])(info);
  Call(kOutput, context, std::size_t{0}, static_cast<const std::int64_t*>(shape), rank, &y);
  Call(kTensorData, x, &from);
  Call(kTensorData, y, &to);
  std::int64_t count = 1;
  for (std::size_t i = 0; i < rank; ++i) {
    count *= shape[i];
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = static_cast<const float*>(from)[i];
    static_cast<float*>(to)[i] = value * value * value;
  }
  return nullptr;
}

struct CustomOp {
  std::uint32_t version = 17;
  void* (*CreateKernel)(const CustomOp*, const OrtApi*, const void*) = nullptr;
  const char* (*GetName)(const CustomOp*) = [](const CustomOp*) { return "Cube"; };
  const char* (*GetExecutionProvider)(const CustomOp*) = [](const CustomOp*) -> const char* { return nullptr; };
  int (*GetInputType)(const CustomOp*, std::size_t) = [](const CustomOp*, std::size_t) { return 1; };
  std::size_t (*GetInputTypeCount)(const CustomOp*) = [](const CustomOp*) { return std::size_t{1}; };
  int (*GetOutputType)(const CustomOp*, std::size_t) = [](const CustomOp*, std::size_t) { return 1; };
  std::size_t (*GetOutputTypeCount)(const CustomOp*) = [](const CustomOp*) { return std::size_t{1}; };
  void (*KernelCompute)(void*, void*) = nullptr;
  void (*KernelDestroy)(void*) = [](void*) {};
  int (*GetInputCharacteristic)(const CustomOp*, std::size_t) = [](const CustomOp*, std::size_t) { return 0; };
  int (*GetOutputCharacteristic)(const CustomOp*, std::size_t) = [](const CustomOp*, std::size_t) { return 0; };
  int (*GetInputMemoryType)(const CustomOp*, std::size_t) = [](const CustomOp*, std::size_t) { return 0; };
  int (*GetVariadicInputMinArity)(const CustomOp*) = [](const CustomOp*) { return 0; };
  int (*GetVariadicInputHomogeneity)(const CustomOp*) = [](const CustomOp*) { return 0; };
  int (*GetVariadicOutputMinArity)(const CustomOp*) = [](const CustomOp*) { return 0; };
  int (*GetVariadicOutputHomogeneity)(const CustomOp*) = [](const CustomOp*) { return 0; };
  void* (*CreateKernelV2)(const CustomOp*, const OrtApi*, const void*, void**) =
      [](const CustomOp*, const OrtApi*, const void*, void** kernel) -> void* {
    static int anything = 0;
    *kernel = &anything;
    return nullptr;
  };
  void* (*KernelComputeV2)(void*, void*) = Compute;
  void* (*InferOutputShape)(const CustomOp*, void*) = nullptr;
  int (*GetStartVersion)(const CustomOp*) = [](const CustomOp*) { return 1; };
  int (*GetEndVersion)(const CustomOp*) = [](const CustomOp*) { return 0x7fffffff; };
};

const CustomOp g_cube;

}  // namespace

extern "C" void* RegisterCustomOps(void* options, const OrtApiBase* base) {
  g_api = base->GetApi(17);
  void* domain = nullptr;
  Call(kCreateDomain, "example.ops", &domain);
  Call(kDomainAdd, domain, &g_cube);
  return Call(kAddDomain, options, domain);
}
