// What a kernel sees of a tensor, and the failures that it can report.
#ifndef POSTQUANT_CSRC_TENSOR_H_
#define POSTQUANT_CSRC_TENSOR_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace postquant {

// One sentence about a node. It is caught where onnxruntime called us and becomes its status.
class OperatorError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Sizes of a tensor's axes. Kept in place: a run makes several of them.
class Shape {
 public:
  static constexpr std::size_t kMaxRank = 8;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> dims);

  std::size_t rank() const { return rank_; }
  std::int64_t operator[](std::size_t axis) const { return dims_[axis]; }
  const std::int64_t* data() const { return dims_.data(); }
  std::int64_t* data() { return dims_.data(); }
  void set(std::size_t axis, std::int64_t size) { dims_[axis] = size; }
  void resize(std::size_t rank);  // OperatorError beyond kMaxRank; new axes are 0
  bool operator==(const Shape& other) const;
  std::string Text() const;  // "[1, 64, 56, 56]"

  // Product of the sizes of axes `first` to `last - 1`. OperatorError if one is negative or the product of the sizes
  // that are not 0 is beyond kMaxElements, so that any further multiplication by a small number is safe.
  std::size_t Count(std::size_t first, std::size_t last) const;
  std::size_t Count() const { return Count(0, rank_); }

  static constexpr std::size_t kMaxElements = std::size_t{1} << 46;

 private:
  std::array<std::int64_t, kMaxRank> dims_{};
  std::size_t rank_ = 0;
};

template <typename T>
struct ElementTypeOf;
template <>
struct ElementTypeOf<float> {
  static constexpr abi::ElementType kValue = abi::kFloat;
};
template <>
struct ElementTypeOf<std::uint8_t> {
  static constexpr abi::ElementType kValue = abi::kUint8;
};
template <>
struct ElementTypeOf<std::int8_t> {
  static constexpr abi::ElementType kValue = abi::kInt8;
};
template <>
struct ElementTypeOf<std::int32_t> {
  static constexpr abi::ElementType kValue = abi::kInt32;
};

// A tensor of onnxruntime's; the memory is not ours.
struct Tensor {
  int type = 0;
  Shape shape;
  std::size_t count = 0;  // shape.Count()
  const void* data = nullptr;

  template <typename T>
  const T* As() const {
    if (type != ElementTypeOf<T>::kValue) {
      throw OperatorError("a tensor has another element type than its operator was registered for.");
    }
    return static_cast<const T*>(data);
  }
};

// A small array as text, for sentences: "[1, 1]".
std::string Text(const std::vector<std::int64_t>& values);

}  // namespace postquant

#endif  // POSTQUANT_CSRC_TENSOR_H_
