#include "shape_inference.h"

#include <atomic>
#include <string>

namespace postquant {
namespace {

constexpr std::size_t kMostIntegers = 64;  // no attribute of ours is longer

// An axis without a name would be taken for one of size -1. A new name claims nothing.
std::string NewSymbol() {
  static std::atomic<unsigned> count{0};
  return "unk__postquant_" + std::to_string(count++);
}

}  // namespace

bool ShapeInference::Succeeded(OrtStatus* status) const {
  if (status != nullptr) {
    abi::ReleaseStatus::Call(api_, status);
  }
  return status == nullptr;
}

const abi::ShapeInfo* ShapeInference::Info(std::size_t input) const {
  const OrtShapeInferContext* const context = context_;
  std::size_t inputs = 0;
  abi::ShapeInfo* info = nullptr;
  if (!Succeeded(abi::ShapeInputCount::Call(api_, context, &inputs)) || input >= inputs ||
      !Succeeded(abi::ShapeInput::Call(api_, context, input, &info))) {
    return nullptr;
  }
  return info;
}

int ShapeInference::Type(std::size_t input) const {
  const abi::ShapeInfo* const info = Info(input);
  int type = 0;
  return info != nullptr && Succeeded(abi::GetTensorElementType::Call(api_, info, &type)) ? type : 0;
}

bool ShapeInference::Input(std::size_t input, std::vector<Axis>* out) const {
  const abi::ShapeInfo* const info = Info(input);
  std::size_t rank = 0;
  if (info == nullptr) {
    return false;
  }
  if (!Succeeded(abi::GetDimensionsCount::Call(api_, info, &rank)) || rank == 0) {
    return false;  // a scalar and an unknown shape look the same here
  }
  std::vector<std::int64_t> sizes(rank);
  std::vector<const char*> symbols(rank, "");
  if (!Succeeded(abi::GetDimensions::Call(api_, info, sizes.data(), rank)) ||
      !Succeeded(abi::GetSymbolicDimensions::Call(api_, info, symbols.data(), rank))) {
    return false;
  }
  out->resize(rank);
  for (std::size_t axis = 0; axis < rank; ++axis) {
    (*out)[axis] = {sizes[axis], symbols[axis] == nullptr ? "" : symbols[axis]};
  }
  return true;
}

bool ShapeInference::Ints(const char* name, std::vector<std::int64_t>* out) const {
  const OrtShapeInferContext* const context = context_;
  const OrtOpAttr* attribute = nullptr;
  if (!Succeeded(abi::ShapeAttribute::Call(api_, context, name, &attribute)) || attribute == nullptr) {
    return false;
  }
  out->assign(kMostIntegers, 0);
  std::size_t bytes = 0;
  if (!Succeeded(abi::ReadAttribute::Call(api_, attribute, static_cast<int>(abi::kAttributeInts),
                                          static_cast<void*>(out->data()), kMostIntegers * sizeof(std::int64_t),
                                          &bytes)) ||
      bytes > kMostIntegers * sizeof(std::int64_t)) {
    return false;
  }
  out->resize(bytes / sizeof(std::int64_t));
  return true;
}

void ShapeInference::SetOutput(std::size_t output, int type, const std::vector<Axis>& axes) const {
  const OrtShapeInferContext* const context = context_;
  abi::ShapeInfo* info = nullptr;
  if (type == 0 || !Succeeded(abi::CreateTensorTypeAndShapeInfo::Call(api_, &info))) {
    return;
  }
  std::vector<std::int64_t> sizes;
  std::vector<std::string> names;
  std::vector<const char*> symbols;
  for (const Axis& axis : axes) {
    const bool unknown = axis.size < 0 && axis.symbol[0] == '\0';
    sizes.push_back(axis.size);
    names.push_back(unknown ? NewSymbol() : axis.symbol);
  }
  for (const std::string& name : names) {
    symbols.push_back(name.c_str());
  }
  const std::int64_t* const data = sizes.data();
  if (Succeeded(abi::SetTensorElementType::Call(api_, info, type)) &&
      Succeeded(abi::SetDimensions::Call(api_, info, data, sizes.size())) &&
      Succeeded(abi::SetSymbolicDimensions::Call(api_, info, symbols.data(), symbols.size()))) {
    Succeeded(abi::SetShapeOutput::Call(api_, context, output, static_cast<const abi::ShapeInfo*>(info)));
  }
  abi::ReleaseTensorTypeAndShapeInfo::Call(api_, info);
}

}  // namespace postquant
