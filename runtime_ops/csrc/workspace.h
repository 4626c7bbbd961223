// Scratch memory of one call. One buffer per calling thread is kept for the next call, of whatever operator: fresh
// memory costs a page fault per 4 kB, and a buffer that all layers share stays in the cache.
#ifndef POSTQUANT_CSRC_WORKSPACE_H_
#define POSTQUANT_CSRC_WORKSPACE_H_

#include <cstddef>
#include <memory>
#include <utility>

namespace postquant {

class Workspace {
 public:
  // std::bad_alloc if there is no memory. Alignment is that of new.
  explicit Workspace(std::size_t size) {
    Buffer& kept = Kept();
    buffer_ = std::move(kept);  // a nested call finds none and makes its own
    kept.size = 0;
    if (buffer_.size < size) {
      buffer_.data.reset();
      buffer_.size = 0;
      buffer_.data.reset(new unsigned char[size]);
      buffer_.size = size;
    }
  }

  ~Workspace() {
    if (buffer_.size <= kMostKept) {
      Kept() = std::move(buffer_);
    }
  }

  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return buffer_.data.get(); }

 private:
  static constexpr std::size_t kMostKept = std::size_t{32} << 20;

  struct Buffer {
    std::unique_ptr<unsigned char[]> data;
    std::size_t size = 0;
  };

  static Buffer& Kept() {
    thread_local Buffer buffer;
    return buffer;
  }

  Buffer buffer_;
};

}  // namespace postquant

#endif  // POSTQUANT_CSRC_WORKSPACE_H_
