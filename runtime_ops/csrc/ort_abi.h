// The part of onnxruntime's C ABI that this library uses, declared here so that the build needs no onnxruntime headers.
//
// The ABI is stable by contract: OrtApi is an append-only table of function pointers. A function is therefore named
// by its position in the table, which is the same in every version since the one that appended it. We ask for
// version 17 (onnxruntime 1.17) and use nothing younger.
#ifndef POSTQUANT_CSRC_ORT_ABI_H_
#define POSTQUANT_CSRC_ORT_ABI_H_

#include <cstddef>
#include <cstdint>

extern "C" {

// Opaque to us. A status pointer is null for success.
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;

}  // extern "C"

namespace postquant::abi {

constexpr std::uint32_t kApiVersion = 17;

// Positions in OrtApi, counted from 0.
enum class Slot : std::size_t {
  kCreateCustomOpDomain = 26,
  kAddCustomOpDomain = 28,
};

// Signatures, named as the slots.
using CreateCustomOpDomain = OrtStatus* (*)(const char* domain, OrtCustomOpDomain** out);
using AddCustomOpDomain = OrtStatus* (*)(OrtSessionOptions* options, OrtCustomOpDomain* domain);

using AnyFunction = void (*)();
constexpr std::size_t kSlotsUsed = 29;  // the highest Slot + 1

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

// The function at `slot`, with its signature.
template <typename Function>
Function At(const OrtApi& api, Slot slot) {
  return reinterpret_cast<Function>(api.slots[static_cast<std::size_t>(slot)]);
}

}  // namespace postquant::abi

#endif  // POSTQUANT_CSRC_ORT_ABI_H_
