// The entry point that onnxruntime looks up: adds domain ai.postquant, version 1, to a session's options.
//
// A model that uses an operator of the domain carries its definition as a model-local function as well, so it runs
// the same, only slower, without this library.
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "custom_op.h"
#include "isa.h"
#include "operators.h"
#include "ort_abi.h"

#if defined(_WIN32)
#define POSTQUANT_EXPORT __declspec(dllexport)
#else
#define POSTQUANT_EXPORT __attribute__((visibility("default")))
#endif

namespace {

using postquant::OperatorList;
namespace abi = postquant::abi;

constexpr const char* kDomain = "ai.postquant";

// Session options keep plain pointers to the domain and its operators, so one domain serves every session. It is never
// released: a session may outlive the static objects of this library. A process may hold several onnxruntimes (one in
// an application, one in a Python wheel); each has an OrtApi and a domain of its own.
struct Domain {
  const OrtApi* api = nullptr;
  OrtCustomOpDomain* domain = nullptr;
  OperatorList operators;
};

OperatorList MakeOperators(const OrtApi* api) {
  OperatorList list;
  postquant::AddLutQLinearConv(api, &list);
  postquant::AddLutQLinearMatMul(api, &list);
  postquant::AddLutMatMulIntegerToFloat(api, &list);
  postquant::AddAdaptiveQuantize(api, &list);
  postquant::AddAdaptiveRequantize(api, &list);
  postquant::AddBorderQuantize(api, &list);
  postquant::AddLutRequantize(api, &list);
  postquant::AddFeedbackRequantize(api, &list);
  return list;
}

// Null for success. A domain that could not be completed is dropped without being released, which onnxruntime's
// table offers but which a failure as rare as this one does not need.
OrtStatus* MakeDomain(const OrtApi* api, std::unique_ptr<Domain>* out) {
  auto made = std::make_unique<Domain>();
  made->api = api;
  made->operators = MakeOperators(api);
  if (OrtStatus* const status = abi::CreateCustomOpDomain::Call(api, kDomain, &made->domain)) {
    return status;
  }
  for (const auto& op : made->operators) {
    if (OrtStatus* const status =
            abi::CustomOpDomainAdd::Call(api, made->domain, static_cast<const OrtCustomOp*>(op.get()))) {
      return status;
    }
  }
  *out = std::move(made);
  return nullptr;
}

OrtStatus* GetDomain(const OrtApi* api, OrtCustomOpDomain** out) {
  static std::mutex mutex;
  static auto* const domains = new std::vector<std::unique_ptr<Domain>>();
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& known : *domains) {
    if (known->api == api) {
      *out = known->domain;
      return nullptr;
    }
  }
  domains->reserve(domains->size() + 1);
  std::unique_ptr<Domain> made;
  if (OrtStatus* const status = MakeDomain(api, &made)) {
    return status;
  }
  *out = made->domain;
  domains->push_back(std::move(made));
  return nullptr;
}

}  // namespace

// Returns null for success. On an onnxruntime older than 1.17 nothing is registered, which is no failure: the
// functions inside the model run instead.
extern "C" POSTQUANT_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) noexcept {
  const OrtApi* const api = base->GetApi(abi::kApiVersion);
  if (api == nullptr) {
    return nullptr;
  }
  OrtStatus* failure = nullptr;
  OrtStatus* const thrown = postquant::Guarded(api, kDomain, [&] {
    if (postquant::IsaProblem() != nullptr) {
      throw postquant::OperatorError(postquant::IsaProblem() + std::string("."));
    }
    OrtCustomOpDomain* domain = nullptr;
    failure = GetDomain(api, &domain);
    if (failure == nullptr) {
      failure = abi::AddCustomOpDomain::Call(api, options, domain);
    }
  });
  return thrown != nullptr ? thrown : failure;
}
