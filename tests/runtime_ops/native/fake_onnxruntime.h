// Plays onnxruntime for the operator library: enough of its C interface to make kernels and run them, with tensors
// whose memory is exactly as large as they say, so that a sanitizer sees every step beyond.
#ifndef POSTQUANT_TESTS_FAKE_ONNXRUNTIME_H_
#define POSTQUANT_TESTS_FAKE_ONNXRUNTIME_H_

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ort_abi.h"

struct OrtStatus {
  std::string message;
};
struct OrtSessionOptions {
  OrtCustomOpDomain* domain = nullptr;
};
struct OrtCustomOpDomain {
  std::vector<const OrtCustomOp*> ops;
};
struct OrtValue {
  int type = 0;
  std::vector<std::int64_t> dims;
  std::unique_ptr<unsigned char[]> data;

  std::size_t Count() const {
    std::size_t count = 1;
    for (const std::int64_t size : dims) {
      count *= static_cast<std::size_t>(size);
    }
    return count;
  }
  std::size_t ElementSize() const { return type == 1 || type == 6 ? 4 : 1; }
  void Allocate() { data.reset(new unsigned char[Count() * ElementSize()]()); }
};
struct OrtTensorTypeAndShapeInfo {
  int type;
  std::vector<std::int64_t> dims;
};
struct OrtKernelInfo {
  std::map<std::string, std::int64_t> ints;
  std::map<std::string, float> floats;
  std::map<std::string, std::vector<std::int64_t>> lists;
  const std::vector<OrtValue>* inputs = nullptr;
  bool constants = false;
};
struct OrtKernelContext {
  const std::vector<OrtValue>* inputs = nullptr;
  std::vector<OrtValue> outputs;
};

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) noexcept;

namespace fake {

constexpr std::size_t kMostBytes = std::size_t{64} << 20;  // of an output

inline OrtStatus* Failed(const char* message) { return new OrtStatus{message}; }

inline OrtStatus* CreateStatus(int, const char* message) { return Failed(message); }
inline const char* GetErrorMessage(const OrtStatus* status) { return status->message.c_str(); }
inline void ReleaseStatus(OrtStatus* status) { delete status; }
inline OrtStatus* CreateDomain(const char*, OrtCustomOpDomain** out) {
  *out = new OrtCustomOpDomain;
  return nullptr;
}
inline OrtStatus* AddOp(OrtCustomOpDomain* domain, const OrtCustomOp* op) {
  domain->ops.push_back(op);
  return nullptr;
}
inline OrtStatus* AddDomain(OrtSessionOptions* options, OrtCustomOpDomain* domain) {
  options->domain = domain;
  return nullptr;
}
inline OrtStatus* MutableData(OrtValue* value, void** out) {
  *out = value->data.get();
  return nullptr;
}
inline OrtStatus* ElementType(const OrtTensorTypeAndShapeInfo* info, int* out) {
  *out = info->type;
  return nullptr;
}
inline OrtStatus* DimensionsCount(const OrtTensorTypeAndShapeInfo* info, std::size_t* out) {
  *out = info->dims.size();
  return nullptr;
}
inline OrtStatus* Dimensions(const OrtTensorTypeAndShapeInfo* info, std::int64_t* out, std::size_t count) {
  std::copy_n(info->dims.begin(), count, out);
  return nullptr;
}
inline OrtStatus* TypeAndShape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) {
  *out = new OrtTensorTypeAndShapeInfo{value->type, value->dims};
  return nullptr;
}
inline void ReleaseInfo(OrtTensorTypeAndShapeInfo* info) { delete info; }

template <typename Map, typename Out>
OrtStatus* Find(const Map& map, const char* name, Out* out) {
  const auto found = map.find(name);
  if (found == map.end()) {
    return Failed("no such attribute");
  }
  *out = found->second;
  return nullptr;
}
inline OrtStatus* FloatAttribute(const OrtKernelInfo* info, const char* name, float* out) {
  return Find(info->floats, name, out);
}
inline OrtStatus* IntAttribute(const OrtKernelInfo* info, const char* name, std::int64_t* out) {
  return Find(info->ints, name, out);
}
// There are none.
inline OrtStatus* StringAttribute(const OrtKernelInfo*, const char*, char*, std::size_t*) {
  return Failed("no such attribute");
}
inline OrtStatus* IntsAttribute(const OrtKernelInfo* info, const char* name, std::int64_t* out, std::size_t* size) {
  std::vector<std::int64_t> values;
  OrtStatus* const status = Find(info->lists, name, &values);
  if (status == nullptr) {
    if (out != nullptr) {
      std::copy_n(values.begin(), *size, out);
    }
    *size = values.size();
  }
  return status;
}
inline OrtStatus* NodeName(const OrtKernelInfo*, char* out, std::size_t* size) {
  constexpr const char kName[] = "node";
  if (out != nullptr) {
    std::memcpy(out, kName, sizeof kName);
  }
  *size = sizeof kName;
  return nullptr;
}
inline OrtStatus* ConstantInput(const OrtKernelInfo* info, std::size_t index, int* is_constant, const OrtValue** out) {
  *is_constant = info->constants ? 1 : 0;
  *out = info->constants ? &info->inputs->at(index) : nullptr;
  return nullptr;
}
inline OrtStatus* Input(const OrtKernelContext* context, std::size_t index, const OrtValue** out) {
  *out = &context->inputs->at(index);
  return nullptr;
}
inline OrtStatus* Output(OrtKernelContext* context, std::size_t index, const std::int64_t* dims, std::size_t rank,
                         OrtValue** out) {
  OrtValue& value = context->outputs.at(index);
  value.dims.assign(dims, dims + rank);
  std::size_t bytes = value.ElementSize();
  for (const std::int64_t size : value.dims) {
    const auto factor = static_cast<std::size_t>(size);
    if (size < 0 || (factor != 0 && bytes > kMostBytes / factor)) {
      return Failed("no memory for the output");
    }
    bytes *= factor;
  }
  value.Allocate();
  *out = &value;
  return nullptr;
}
// Backwards: no task may count on those before it.
inline OrtStatus* ParallelFor(const OrtKernelContext*, postquant::abi::Task task, std::size_t total, std::size_t,
                              void* user) {
  for (std::size_t i = total; i-- > 0;) {
    task(user, i);
  }
  return nullptr;
}

inline OrtApi MakeApi() {
  OrtApi api{};
  const auto set = [&api](std::size_t slot, auto function) {
    api.slots[slot] = reinterpret_cast<postquant::abi::AnyFunction>(function);
  };
  set(0, &CreateStatus);
  set(2, &GetErrorMessage);
  set(26, &CreateDomain);
  set(27, &AddOp);
  set(28, &AddDomain);
  set(51, &MutableData);
  set(60, &ElementType);
  set(61, &DimensionsCount);
  set(62, &Dimensions);
  set(65, &TypeAndShape);
  set(85, &FloatAttribute);
  set(86, &IntAttribute);
  set(87, &StringAttribute);
  set(90, &Input);
  set(91, &Output);
  set(93, &ReleaseStatus);
  set(99, &ReleaseInfo);
  set(163, &IntsAttribute);
  set(244, &NodeName);
  set(249, &ConstantInput);
  set(274, &ParallelFor);
  return api;
}

}  // namespace fake

#endif  // POSTQUANT_TESTS_FAKE_ONNXRUNTIME_H_
