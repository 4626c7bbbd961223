// Plays onnxruntime for RegisterCustomOps: an old version, a failing domain, a failing operator, a failing session, an
// instruction set that is not there, two good sessions, and a second onnxruntime in the process.
// Prints "ok"; built with sanitizers by test_library.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "isa.h"
#include "operators.h"
#include "ort_abi.h"

struct OrtStatus {
  char message[128];
};
struct OrtSessionOptions {
  OrtCustomOpDomain* domain = nullptr;
};
struct OrtCustomOpDomain {
  char name[32];
  int operators;
};

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) noexcept;

namespace {

OrtStatus g_failure;
bool g_create_fails = false;
bool g_operator_fails = false;
bool g_add_fails = false;
const char* g_isa_problem = nullptr;
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
  g_domain.operators = 0;
  *out = &g_domain;
  return nullptr;
}

OrtStatus* AddOperator(OrtCustomOpDomain* domain, const OrtCustomOp*) {
  if (g_operator_fails) {
    return &g_failure;
  }
  ++domain->operators;
  return nullptr;
}

OrtStatus* CreateStatus(int, const char* message) {
  std::snprintf(g_failure.message, sizeof(g_failure.message), "%s", message);
  return &g_failure;
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

// Operators and instruction sets are not what is tested here.
namespace postquant {

const char* IsaProblem() { return g_isa_problem; }
void AddLutQLinearConv(const OrtApi*, OperatorList* list) { list->push_back(std::make_shared<OrtCustomOp>()); }
void AddLutQLinearMatMul(const OrtApi*, OperatorList* list) { list->push_back(std::make_shared<OrtCustomOp>()); }
void AddLutMatMulIntegerToFloat(const OrtApi*, OperatorList*) {}
void AddAdaptiveQuantize(const OrtApi*, OperatorList*) {}
void AddAdaptiveRequantize(const OrtApi*, OperatorList*) {}
void AddBorderQuantize(const OrtApi*, OperatorList*) {}
void AddLutRequantize(const OrtApi*, OperatorList*) {}
void AddFeedbackRequantize(const OrtApi*, OperatorList*) {}

}  // namespace postquant

int main() {
  g_api.slots[0] = reinterpret_cast<postquant::abi::AnyFunction>(&CreateStatus);
  g_api.slots[26] = reinterpret_cast<postquant::abi::AnyFunction>(&Create);
  g_api.slots[27] = reinterpret_cast<postquant::abi::AnyFunction>(&AddOperator);
  g_api.slots[28] = reinterpret_cast<postquant::abi::AnyFunction>(&Add);
  const OrtApiBase base = {&GetApi, &GetVersionString};
  OrtSessionOptions options;

  g_version = 16;
  Check(RegisterCustomOps(&options, &base) == nullptr && options.domain == nullptr, "an old runtime is left alone");
  g_version = 29;
  g_create_fails = true;
  Check(RegisterCustomOps(&options, &base) == &g_failure && options.domain == nullptr, "a failed domain is passed on");
  g_create_fails = false;
  g_operator_fails = true;
  Check(RegisterCustomOps(&options, &base) == &g_failure && options.domain == nullptr, "a failed operator too");
  g_operator_fails = false;
  g_isa_problem = "no such set";
  Check(RegisterCustomOps(&options, &base) == &g_failure && options.domain == nullptr, "so is a missing set");
  Check(std::strcmp(g_failure.message, "ai.postquant: no such set.") == 0, "with its sentence");
  g_isa_problem = nullptr;
  g_created = 0;
  g_add_fails = true;
  Check(RegisterCustomOps(&options, &base) == &g_failure, "a failed session is passed on");
  g_add_fails = false;
  Check(RegisterCustomOps(&options, &base) == nullptr, "the next session works after failures");
  Check(std::strcmp(options.domain->name, "ai.postquant") == 0, "the domain has its name");
  OrtSessionOptions second;
  Check(RegisterCustomOps(&second, &base) == nullptr && second.domain == options.domain, "sessions share the domain");
  Check(g_created == 1 && g_domain.operators == 2, "one domain per onnxruntime");
  OrtApi other = g_api;
  static const OrtApi* g_other = &other;
  const OrtApiBase other_base = {[](std::uint32_t) { return g_other; }, &GetVersionString};
  Check(RegisterCustomOps(&options, &other_base) == nullptr && g_created == 2, "another onnxruntime has its own");
  std::puts("ok");
  return 0;
}
