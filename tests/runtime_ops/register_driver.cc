// Plays onnxruntime for RegisterCustomOps: an old version, a failing domain, a failing session, two good sessions.
// Prints "ok"; built with sanitizers by test_library.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "ort_abi.h"

struct OrtStatus {};
struct OrtSessionOptions {
  OrtCustomOpDomain* domain = nullptr;
};
struct OrtCustomOpDomain {
  char name[32];
};

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) noexcept;

namespace {

OrtStatus g_failure;
bool g_create_fails = false;
bool g_add_fails = false;
int g_created = 0;
std::uint32_t g_version = 17;
OrtCustomOpDomain g_domain;
OrtApi g_api;

OrtStatus* Create(const char* name, OrtCustomOpDomain** out) {
  if (g_create_fails) {
    return &g_failure;
  }
  ++g_created;
  std::snprintf(g_domain.name, sizeof(g_domain.name), "%s", name);
  *out = &g_domain;
  return nullptr;
}

OrtStatus* Add(OrtSessionOptions* options, OrtCustomOpDomain* domain) {
  if (g_add_fails) {
    return &g_failure;
  }
  options->domain = domain;
  return nullptr;
}

const OrtApi* GetApi(std::uint32_t version) { return version <= g_version ? &g_api : nullptr; }
const char* GetVersionString() { return "1.17.0"; }

void Check(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
  }
}

}  // namespace

int main() {
  g_api.slots[26] = reinterpret_cast<postquant::abi::AnyFunction>(&Create);
  g_api.slots[28] = reinterpret_cast<postquant::abi::AnyFunction>(&Add);
  const OrtApiBase base = {&GetApi, &GetVersionString};
  OrtSessionOptions options;

  g_version = 16;
  Check(RegisterCustomOps(&options, &base) == nullptr && options.domain == nullptr, "an old runtime is left alone");
  g_version = 29;
  g_create_fails = true;
  Check(RegisterCustomOps(&options, &base) == &g_failure && options.domain == nullptr, "a failed domain is passed on");
  g_create_fails = false;
  g_add_fails = true;
  Check(RegisterCustomOps(&options, &base) == &g_failure, "a failed session is passed on");
  g_add_fails = false;
  Check(RegisterCustomOps(&options, &base) == nullptr, "the next session works after failures");
  Check(std::strcmp(options.domain->name, "ai.postquant") == 0, "the domain has its name");
  OrtSessionOptions second;
  Check(RegisterCustomOps(&second, &base) == nullptr && second.domain == options.domain, "sessions share the domain");
  Check(g_created == 1, "one domain per process");
  std::puts("ok");
  return 0;
}
