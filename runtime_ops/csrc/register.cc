// The entry point that onnxruntime looks up: adds domain ai.postquant, version 1, to a session's options.
//
// The domain holds no kernel yet. A model that uses an operator of the domain carries its definition as a
// model-local function, so it runs the same with an empty domain, with kernels, and without this library.
#include <mutex>

#include "ort_abi.h"

#if defined(_WIN32)
#define POSTQUANT_EXPORT __declspec(dllexport)
#else
#define POSTQUANT_EXPORT __attribute__((visibility("default")))
#endif

namespace {

using postquant::abi::Slot;

constexpr const char* kDomain = "ai.postquant";

// Session options keep a plain pointer to the domain, so one domain serves every session of the process. It is never
// released: a session may outlive the static objects of this library.
OrtStatus* GetDomain(const OrtApi& api, OrtCustomOpDomain** out) {
  static std::mutex mutex;
  static OrtCustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    const auto create = postquant::abi::At<postquant::abi::CreateCustomOpDomain>(api, Slot::kCreateCustomOpDomain);
    if (OrtStatus* const status = create(kDomain, &domain)) {
      domain = nullptr;
      return status;
    }
  }
  *out = domain;
  return nullptr;
}

}  // namespace

// Returns null for success. On an onnxruntime older than 1.17 nothing is registered, which is no failure: the
// functions inside the model run instead.
extern "C" POSTQUANT_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) noexcept {
  const OrtApi* const api = base->GetApi(postquant::abi::kApiVersion);
  if (api == nullptr) {
    return nullptr;
  }
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatus* const status = GetDomain(*api, &domain)) {
    return status;
  }
  return postquant::abi::At<postquant::abi::AddCustomOpDomain>(*api, Slot::kAddCustomOpDomain)(options, domain);
}
