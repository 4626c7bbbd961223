#include "simulate_levels.h"

#include <cstddef>
#include <new>

#include "quantize_kernels.h"
#include "simulate_passes.h"
#include "simulate_tables.h"

#if defined(_WIN32)
#define POSTQUANT_EXPORT __declspec(dllexport)
#else
#define POSTQUANT_EXPORT __attribute__((visibility("default")))
#endif

namespace {

constexpr int kDone = 0;
constexpr int kOutOfRange = 1;
constexpr int kNoMemory = 2;

bool InRange(const PostquantLevels& call) {
  using namespace postquant::quantize;  // NOLINT: limits
  const bool levels = call.count >= 2 && call.count <= static_cast<std::int64_t>(kSimulatedLevels);
  if (!levels || call.outer < 1 || call.channels < 1 || call.inner < 1) {
    return false;
  }
  const PostquantFeedback* const feedback = call.feedback;
  if (feedback == nullptr) {
    return true;
  }
  if (call.channels < 2 || feedback->rank < 1 || feedback->groups < 1 ||
      feedback->groups > static_cast<std::int64_t>(kFeedbackGroups)) {
    return false;
  }
  for (std::int64_t group = 0, begin = 0; group < feedback->groups; begin = feedback->ends[group], ++group) {
    if (feedback->ends[group] <= begin) {
      return false;
    }
  }
  for (std::int64_t c = 0; c < call.channels; ++c) {
    if (feedback->order[c] < 0 || feedback->order[c] >= call.channels) {
      return false;
    }
  }
  return feedback->ends[feedback->groups - 1] == call.channels;
}

template <typename Body>
int Checked(const PostquantLevels& call, const Body& body) noexcept {
  if (!InRange(call)) {
    return kOutOfRange;
  }
  try {
    body();
    return kDone;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace

extern "C" POSTQUANT_EXPORT int postquant_simulate_levels(const PostquantLevels* call, const float* x, float* y,
                                                          std::int16_t* places) noexcept {
  return Checked(*call, [&] { postquant::quantize::SimulateLevels(*call, x, y, places); });
}

extern "C" POSTQUANT_EXPORT int postquant_simulate_levels_back(const PostquantLevels* call, const float* grad,
                                                               const std::int16_t* places, float* to_x,
                                                               float* to_levels) noexcept {
  return Checked(*call, [&] { postquant::quantize::SimulateLevelsBack(*call, grad, places, to_x, to_levels); });
}
