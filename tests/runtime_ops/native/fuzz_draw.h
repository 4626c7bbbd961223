// What random bytes decide.
#ifndef POSTQUANT_TESTS_FUZZ_DRAW_H_
#define POSTQUANT_TESTS_FUZZ_DRAW_H_

#include <cstddef>
#include <cstdint>

namespace fuzz {

// Decisions from bytes; zeros when they run out.
class Draw {
 public:
  Draw(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t Byte() {
    if (at_ == size_) {
      return 0;
    }
    return data_[at_++];
  }
  std::int64_t Between(std::int64_t low, std::int64_t high) { return low + Byte() % (high - low + 1); }
  bool OneIn(int count) { return Byte() % count == 1; }
  float Scale() { return 0.001F * static_cast<float>(1 + Byte()); }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t at_ = 0;
};

}  // namespace fuzz

#endif  // POSTQUANT_TESTS_FUZZ_DRAW_H_
