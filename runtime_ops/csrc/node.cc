#include "node.h"

#include <cmath>

namespace postquant {
namespace {

// Text of a failed status, which is released; empty for success.
std::string Reason(const OrtApi* api, OrtStatus* status) {
  if (status == nullptr) {
    return "";
  }
  std::string text = abi::GetErrorMessage::Call(api, static_cast<const OrtStatus*>(status));
  abi::ReleaseStatus::Call(api, status);
  return text.empty() ? "unknown" : text;
}

}  // namespace

void Identity::Fail(const std::string& sentence) const {
  throw OperatorError(std::string(signature->name) + (name.empty() ? "" : " '" + name + "'") + ": " + sentence);
}

void Identity::FailInput(std::size_t index, const std::string& problem) const {
  Fail("input " + std::to_string(index) + " (" + signature->inputs[index].name + ") " + problem + ".");
}

void Identity::Check(OrtStatus* status, const char* what) const {
  const std::string reason = Reason(api, status);
  if (!reason.empty()) {
    Fail(std::string(what) + ": " + reason);
  }
}

Tensor Identity::Read(const OrtValue* value, std::size_t input) const {
  if (value == nullptr) {
    FailInput(input, "is missing");
  }
  abi::ShapeInfo* raw = nullptr;
  Check(abi::GetTensorTypeAndShape::Call(api, value, &raw), "onnxruntime cannot tell the shape of an input");
  const auto release = [this](abi::ShapeInfo* info) { abi::ReleaseTensorTypeAndShapeInfo::Call(api, info); };
  const std::unique_ptr<abi::ShapeInfo, decltype(release)> info(raw, release);
  Tensor tensor;
  std::size_t rank = 0;
  const abi::ShapeInfo* const view = info.get();
  Check(abi::GetTensorElementType::Call(api, view, &tensor.type), "onnxruntime cannot tell the type of an input");
  Check(abi::GetDimensionsCount::Call(api, view, &rank), "onnxruntime cannot tell the rank of an input");
  if (rank > Shape::kMaxRank) {
    FailInput(input, "has " + std::to_string(rank) + " axes, at most " + std::to_string(Shape::kMaxRank) +
                         " are supported");
  }
  tensor.shape.resize(rank);
  Check(abi::GetDimensions::Call(api, view, tensor.shape.data(), rank),
        "onnxruntime cannot tell the sizes of an input");
  if (tensor.type != signature->inputs[input].type) {
    FailInput(input, "has another element type than the operator allows");
  }
  tensor.count = tensor.shape.Count();
  if (tensor.count != 0) {
    void* data = nullptr;
    Check(abi::GetTensorMutableData::Call(api, const_cast<OrtValue*>(value), &data),
          "onnxruntime cannot give the data of an input");
    tensor.data = data;
  }
  return tensor;
}

void Identity::ExpectShape(const Tensor& tensor, std::size_t input, const Shape& expected) const {
  if (!(tensor.shape == expected)) {
    FailInput(input, "has shape " + tensor.shape.Text() + ", expected " + expected.Text());
  }
}

void Identity::ExpectScalar(const Tensor& tensor, std::size_t input) const {
  if (tensor.count != 1) {
    FailInput(input, "has shape " + tensor.shape.Text() + ", expected a scalar");
  }
}

void Identity::ExpectScales(const Tensor& tensor, std::size_t input) const {
  const float* const values = tensor.As<float>();
  for (std::size_t i = 0; i < tensor.count; ++i) {
    if (!(values[i] > 0.0F) || !std::isfinite(values[i])) {
      FailInput(input, "holds " + std::to_string(values[i]) + " at position " + std::to_string(i) +
                           ", expected finite numbers above 0");
    }
  }
}

void Identity::ExpectFinite(const Tensor& tensor, std::size_t input) const {
  const float* const values = tensor.As<float>();
  for (std::size_t i = 0; i < tensor.count; ++i) {
    if (!std::isfinite(values[i])) {
      FailInput(input, "holds " + std::to_string(values[i]) + " at position " + std::to_string(i) +
                           ", expected finite numbers");
    }
  }
}

NodeInfo::NodeInfo(const OrtApi* api, const Signature& signature, const OrtKernelInfo* info)
    : identity_{api, &signature, ""}, info_(info) {
  std::size_t size = 0;
  // Asking for the size is reported as a failure by some versions: what counts is the size.
  Reason(api, abi::GetNodeName::Call(api, info, static_cast<char*>(nullptr), &size));
  if (size > 1) {
    std::string name(size, '\0');
    if (Reason(api, abi::GetNodeName::Call(api, info, name.data(), &size)).empty()) {
      name.resize(size - 1);
      identity_.name = std::move(name);
    }
  }
}

std::int64_t NodeInfo::Int(const char* name, std::int64_t least, std::int64_t most) const {
  std::int64_t value = 0;
  if (!Reason(identity_.api, abi::GetIntAttribute::Call(identity_.api, info_, name, &value)).empty()) {
    identity_.Fail(std::string("attribute '") + name + "' is missing or not an integer.");
  }
  if (value < least || value > most) {
    identity_.Fail(std::string("attribute '") + name + "' is " + std::to_string(value) + ", expected " +
                   std::to_string(least) + " to " + std::to_string(most) + ".");
  }
  return value;
}

std::int64_t NodeInfo::IntOr(std::int64_t absent, const char* name, std::int64_t least, std::int64_t most) const {
  return Has(name) ? Int(name, least, most) : absent;
}

// onnxruntime does not tell an attribute that is missing from one of another type, of which it has many getters.
bool NodeInfo::Has(const char* name) const {
  const OrtApi* const api = identity_.api;
  std::int64_t integer = 0;
  float number = 0;
  std::size_t length = 0;
  std::size_t count = 0;
  Reason(api, abi::GetStringAttribute::Call(api, info_, name, static_cast<char*>(nullptr), &length));
  return length != 0 || Reason(api, abi::GetIntAttribute::Call(api, info_, name, &integer)).empty() ||
         Reason(api, abi::GetFloatAttribute::Call(api, info_, name, &number)).empty() ||
         Reason(api, abi::GetIntsAttribute::Call(api, info_, name, static_cast<std::int64_t*>(nullptr), &count))
             .empty();
}

std::vector<std::int64_t> NodeInfo::Ints(const char* name, std::int64_t least, std::int64_t most) const {
  std::size_t size = 0;
  std::vector<std::int64_t> values;
  std::string reason = Reason(identity_.api, abi::GetIntsAttribute::Call(identity_.api, info_, name,
                                                                         static_cast<std::int64_t*>(nullptr), &size));
  if (reason.empty() && size != 0) {
    values.resize(size);
    reason = Reason(identity_.api, abi::GetIntsAttribute::Call(identity_.api, info_, name, values.data(), &size));
  }
  if (!reason.empty()) {
    identity_.Fail(std::string("attribute '") + name + "' is missing or not a list of integers.");
  }
  for (const std::int64_t value : values) {
    if (value < least || value > most) {
      identity_.Fail(std::string("attribute '") + name + "' is " + Text(values) + ", expected numbers from " +
                     std::to_string(least) + " to " + std::to_string(most) + ".");
    }
  }
  return values;
}

std::vector<std::int64_t> NodeInfo::Ints(const char* name, std::size_t count, std::int64_t least,
                                         std::int64_t most) const {
  std::vector<std::int64_t> values = Ints(name, least, most);
  if (values.size() != count) {
    identity_.Fail(std::string("attribute '") + name + "' is " + Text(values) + ", expected " +
                   std::to_string(count) + " numbers.");
  }
  return values;
}

float NodeInfo::Float(const char* name) const {
  float value = 0;
  if (!Reason(identity_.api, abi::GetFloatAttribute::Call(identity_.api, info_, name, &value)).empty()) {
    identity_.Fail(std::string("attribute '") + name + "' is missing or not a float.");
  }
  if (!std::isfinite(value)) {
    identity_.Fail(std::string("attribute '") + name + "' is not a finite number.");
  }
  return value;
}

bool NodeInfo::Constant(std::size_t input, Tensor* out) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  identity_.Check(abi::GetConstantInput::Call(identity_.api, info_, input, &is_constant, &value),
                  "onnxruntime cannot tell whether an input is constant");
  if (is_constant == 0 || value == nullptr) {
    return false;
  }
  *out = identity_.Read(value, input);
  return true;
}

Tensor Run::Input(std::size_t index) const {
  const OrtValue* value = nullptr;
  const OrtKernelContext* const context = context_;
  identity_.Check(abi::GetInput::Call(identity_.api, context, index, &value), "onnxruntime cannot give an input");
  return identity_.Read(value, index);
}

void* Run::OutputData(std::size_t index, const Shape& shape) const {
  shape.Count();  // an output that cannot exist is refused before onnxruntime multiplies its sizes
  OrtValue* value = nullptr;
  identity_.Check(abi::GetOutput::Call(identity_.api, context_, index, shape.data(), shape.rank(), &value),
                  "onnxruntime cannot make an output");
  if (value == nullptr) {
    return nullptr;
  }
  void* data = nullptr;
  identity_.Check(abi::GetTensorMutableData::Call(identity_.api, value, &data), "onnxruntime cannot give an output");
  return data;
}

void Run::Parallel(abi::Task task, std::size_t total, void* user) const {
  const OrtKernelContext* const context = context_;
  identity_.Check(abi::ParallelFor::Call(identity_.api, context, task, total, std::size_t{0}, user),
                  "onnxruntime cannot run tasks");
}

}  // namespace postquant
