// Memory for weights. Large blocks ask for huge pages: a product with few rows reads all of its weights once and is
// bound by memory, where fewer page walks are worth 5 to 10 %.
#include <cstdlib>
#include <cstring>
#include <limits>

#if defined(_MSC_VER)
#include <malloc.h>
#elif defined(__linux__)
#include <sys/mman.h>
#endif

#include "lut_weights.h"

namespace postquant::lut {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

}  // namespace

void FreeAligned::operator()(std::uint8_t* p) const noexcept {
#if defined(_MSC_VER)
  _aligned_free(p);
#else
  std::free(p);
#endif
}

Bytes AllocateZeros(std::int64_t size) noexcept {
  if (size < 0 || static_cast<std::uint64_t>(size) > std::numeric_limits<std::size_t>::max() / 2) {
    return nullptr;
  }
  std::size_t alignment = kAlignment;
#if defined(__linux__)
  if (static_cast<std::size_t>(size) >= 2 * kHugePage) {
    alignment = kHugePage;
  }
#endif
  // aligned_alloc wants a multiple of the alignment, and something to allocate.
  const std::size_t count = (static_cast<std::size_t>(size) / alignment + 1) * alignment;
#if defined(_MSC_VER)
  void* const p = _aligned_malloc(count, alignment);
#else
  void* const p = std::aligned_alloc(alignment, count);
#endif
  if (p != nullptr) {
#if defined(__linux__)
    if (alignment == kHugePage) {
      // A wish; without it the memory is as good as any.
      static_cast<void>(madvise(p, count, MADV_HUGEPAGE));
    }
#endif
    std::memset(p, 0, static_cast<std::size_t>(size));
  }
  return Bytes(static_cast<std::uint8_t*>(p));
}

}  // namespace postquant::lut
