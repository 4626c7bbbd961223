#include "tensor.h"

namespace postquant {
namespace {

std::string Joined(const std::int64_t* values, std::size_t count) {
  std::string text = "[";
  for (std::size_t i = 0; i < count; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  }
  return text + "]";
}

}  // namespace

Shape::Shape(std::initializer_list<std::int64_t> dims) {
  resize(dims.size());
  std::size_t axis = 0;
  for (const std::int64_t size : dims) {
    dims_[axis++] = size;
  }
}

void Shape::resize(std::size_t rank) {
  if (rank > kMaxRank) {
    throw OperatorError("a tensor has " + std::to_string(rank) + " axes, at most " + std::to_string(kMaxRank) +
                        " are supported.");
  }
  for (std::size_t axis = rank_; axis < rank; ++axis) {
    dims_[axis] = 0;
  }
  rank_ = rank;
}

bool Shape::operator==(const Shape& other) const {
  if (rank_ != other.rank_) {
    return false;
  }
  for (std::size_t axis = 0; axis < rank_; ++axis) {
    if (dims_[axis] != other.dims_[axis]) {
      return false;
    }
  }
  return true;
}

std::string Shape::Text() const { return Joined(dims_.data(), rank_); }

std::size_t Shape::Count(std::size_t first, std::size_t last) const {
  std::size_t count = 1;
  bool empty = false;
  for (std::size_t axis = first; axis < last; ++axis) {
    if (dims_[axis] < 0) {
      throw OperatorError("a tensor has a negative size: " + Text() + ".");
    }
    if (dims_[axis] == 0) {
      empty = true;
      continue;
    }
    const auto size = static_cast<std::size_t>(dims_[axis]);
    if (count > kMaxElements / size) {
      throw OperatorError("a tensor is too large: " + Text() + ".");
    }
    count *= size;
  }
  return empty ? 0 : count;
}

std::string Text(const std::vector<std::int64_t>& values) { return Joined(values.data(), values.size()); }

}  // namespace postquant
