// A node as onnxruntime shows it to a custom operator: attributes and constants once, tensors on every run.
//
// Every failure is an OperatorError whose sentence names the operator, the node and, where there is one, the input.
#ifndef POSTQUANT_CSRC_NODE_H_
#define POSTQUANT_CSRC_NODE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "ort_abi.h"
#include "tensor.h"

namespace postquant {

// An input or output of an operator.
struct Port {
  const char* name;
  abi::ElementType type;
};

struct Signature {
  const char* name;
  std::vector<Port> inputs;
  std::vector<Port> outputs;
};

// Who is speaking in an error.
struct Identity {
  const OrtApi* api = nullptr;
  const Signature* signature = nullptr;
  std::string name;  // of the node; may be empty

  [[noreturn]] void Fail(const std::string& sentence) const;
  [[noreturn]] void FailInput(std::size_t index, const std::string& problem) const;
  // Turns a failure of onnxruntime's into ours: `what` failed, for the reason that it gives.
  void Check(OrtStatus* status, const char* what) const;
  Tensor Read(const OrtValue* value, std::size_t input) const;

  // Contracts of inputs. A scalar may also be a tensor of one element.
  void ExpectShape(const Tensor& tensor, std::size_t input, const Shape& expected) const;
  void ExpectScalar(const Tensor& tensor, std::size_t input) const;
  // Every element is finite and above 0.
  void ExpectScales(const Tensor& tensor, std::size_t input) const;
  void ExpectFinite(const Tensor& tensor, std::size_t input) const;
};

// The node while its kernel is made.
class NodeInfo {
 public:
  NodeInfo(const OrtApi* api, const Signature& signature, const OrtKernelInfo* info);

  const Identity& identity() const { return identity_; }
  // Attributes; all of them are required but those of which there is another number to take.
  std::int64_t Int(const char* name, std::int64_t least, std::int64_t most) const;
  std::int64_t IntOr(std::int64_t absent, const char* name, std::int64_t least, std::int64_t most) const;
  std::vector<std::int64_t> Ints(const char* name, std::size_t count, std::int64_t least, std::int64_t most) const;
  std::vector<std::int64_t> Ints(const char* name, std::int64_t least, std::int64_t most) const;
  float Float(const char* name) const;  // finite
  // Whether `input` is a constant of the graph, and which. Its memory lives as long as the session.
  bool Constant(std::size_t input, Tensor* out) const;

 private:
  // Whether there is an attribute of a number, a text or integers.
  bool Has(const char* name) const;

  Identity identity_;
  const OrtKernelInfo* info_;
};

// The node during a run.
class Run {
 public:
  Run(const Identity& identity, OrtKernelContext* context) : identity_(identity), context_(context) {}

  Tensor Input(std::size_t index) const;
  template <typename T>
  T* Output(std::size_t index, const Shape& shape) const {
    return static_cast<T*>(OutputData(index, shape));
  }
  // Calls body(0) to body(total - 1) on onnxruntime's threads. The body must not throw.
  template <typename Body>
  void ParallelFor(std::size_t total, const Body& body) const {
    static_assert(std::is_nothrow_invocable_v<const Body&, std::size_t>, "an exception cannot cross onnxruntime");
    const abi::Task task = [](void* user, std::size_t index) { (*static_cast<const Body*>(user))(index); };
    Parallel(task, total, const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  void* OutputData(std::size_t index, const Shape& shape) const;
  void Parallel(abi::Task task, std::size_t total, void* user) const;

  const Identity& identity_;
  OrtKernelContext* context_;
};

}  // namespace postquant

#endif  // POSTQUANT_CSRC_NODE_H_
