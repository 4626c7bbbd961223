// Arrays within the memory of a Workspace.
#ifndef POSTQUANT_CSRC_SCRATCH_H_
#define POSTQUANT_CSRC_SCRATCH_H_

#include <cstddef>
#include <cstdint>

namespace postquant {

// Scratch memory cut into arrays that start where a line of the cache does: a register that is read across
// two of them costs two reads.
class Scratch {
 public:
  static constexpr std::size_t kLine = 64;

  explicit Scratch(void* data)
      : next_(static_cast<unsigned char*>(data) + (kLine - reinterpret_cast<std::uintptr_t>(data) % kLine)) {}

  template <typename T>
  T* Take(std::size_t count) {
    T* const taken = static_cast<T*>(static_cast<void*>(next_));
    next_ += Bytes<T>(count);
    return taken;
  }

  template <typename T>
  static std::size_t Bytes(std::size_t count) {
    return (count * sizeof(T) + kLine - 1) / kLine * kLine;
  }

 private:
  unsigned char* next_;
};

}  // namespace postquant

#endif  // POSTQUANT_CSRC_SCRATCH_H_
