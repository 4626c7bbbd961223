// Learned code books of random sizes and numbers, in memory that is exactly as large as they say.
#ifndef POSTQUANT_TESTS_FUZZ_LEVELS_H_
#define POSTQUANT_TESTS_FUZZ_LEVELS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "simulate_levels.h"

namespace fuzz {

// Sanitizers see what lies beyond an array of its own.
template <typename T, typename Make>
std::unique_ptr<T[]> Numbers(std::int64_t count, const Make& make) {
  std::unique_ptr<T[]> numbers(new T[static_cast<std::size_t>(count)]);
  std::generate(numbers.get(), numbers.get() + count, make);
  return numbers;
}

// One simulation with its gradients. Levels need not be sorted, and need not be numbers: only then results are.
inline void SimulateLevels(std::mt19937& random) {
  const auto between = [&](std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(random() % static_cast<std::uint32_t>(high - low + 1));
  };
  const bool good = between(0, 3) != 0;
  const auto number = [&] {
    const std::int64_t drawn = between(0, 999);
    return drawn == 0 && !good ? NAN : drawn == 1 ? 1e38F : 0.01F * static_cast<float>(drawn - 400);
  };
  const auto byte = [&] { return static_cast<std::int16_t>(between(-127, 127)); };
  PostquantLevels call{};
  call.outer = between(1, 4);
  call.channels = between(1, 40);
  call.inner = between(0, 2) == 0 ? 1 : between(1, 90);
  call.count = between(2, 16);
  const std::int64_t size = call.outer * call.channels * call.inner;
  const auto levels = Numbers<float>(call.channels * call.count, [&] { return number() * (good ? 0.1F : 1.0F); });
  for (std::int64_t c = 0; good && c < call.channels; ++c) {
    std::sort(levels.get() + c * call.count, levels.get() + (c + 1) * call.count);
  }
  call.levels = levels.get();
  const auto mask = Numbers<float>(size, [&] { return static_cast<float>(between(0, 1)); });
  call.mask = between(0, 1) == 0 ? nullptr : mask.get();

  PostquantFeedback feedback{};
  feedback.rank = between(1, 9);
  feedback.groups = std::min<std::int64_t>(between(1, 8), call.channels);
  std::int64_t group = 0;
  const auto ends = Numbers<std::int64_t>(feedback.groups, [&] { return call.channels * ++group / feedback.groups; });
  std::int64_t channel = call.channels;
  const auto order = Numbers<std::int64_t>(call.channels, [&] { return --channel; });
  std::int64_t lefts = 0;
  for (std::int64_t i = 0; i < feedback.groups; ++i) {
    const std::int64_t members = ends[static_cast<std::size_t>(i)] - (i == 0 ? 0 : ends[static_cast<std::size_t>(i - 1)]);
    lefts += feedback.rank * ((members + 1) / 2 * 2);
  }
  const auto left = Numbers<std::int16_t>(lefts, byte);
  const auto right = Numbers<std::int16_t>(call.channels * ((feedback.rank + 1) / 2 * 2), byte);
  const auto left_scale = Numbers<float>(feedback.rank, number);
  const auto right_scale = Numbers<float>(call.channels, number);
  feedback.ends = ends.get();
  feedback.order = order.get();
  feedback.left = left.get();
  feedback.left_scale = left_scale.get();
  feedback.right = right.get();
  feedback.right_scale = right_scale.get();
  call.feedback = call.channels < 2 || between(0, 1) == 0 ? nullptr : &feedback;

  const auto x = Numbers<float>(size, number);
  const auto y = Numbers<float>(size, [] { return NAN; });
  const auto places = Numbers<std::int16_t>(size, [] { return std::int16_t{-1}; });
  const auto to_levels = Numbers<float>(call.channels * call.count, [] { return NAN; });
  const bool done = postquant_simulate_levels(&call, x.get(), y.get(), places.get()) == 0 &&
                    postquant_simulate_levels_back(&call, x.get(), places.get(), y.get(), to_levels.get()) == 0;
  const auto valid = [&](std::int16_t place) { return place >= 0 && place <= 257; };
  if (!done || !std::all_of(places.get(), places.get() + size, valid)) {
    std::fprintf(stderr, "a simulation failed\n");
    std::abort();
  }
}

}  // namespace fuzz

#endif  // POSTQUANT_TESTS_FUZZ_LEVELS_H_
