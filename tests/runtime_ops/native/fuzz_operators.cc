// Nodes of every operator, drawn from bytes: mostly valid, sometimes with one thing wrong. Each runs with its inputs as
// constants and again with inputs that are computed at run time; both must give the same. Built with sanitizers.
//
//     fuzz_operators SEED SECONDS MOST      random bytes for so long, or that many nodes; prints "ok" and the counts
//     with -DPOSTQUANT_LIBFUZZER and clang -fsanitize=fuzzer: a libFuzzer target
#include <chrono>
#include <cmath>
#include <random>

#include "fake_onnxruntime.h"
#include "fuzz_draw.h"
#include "fuzz_levels.h"

namespace {

using fuzz::Draw;

enum Type : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6 };

struct Node {
  std::string name;
  int x_type = kUint8;
  OrtKernelInfo info;
  std::vector<OrtValue> inputs;
};

OrtValue Tensor(Draw& draw, int type, std::vector<std::int64_t> dims, bool scales = false) {
  OrtValue value;
  value.type = type;
  value.dims = std::move(dims);
  value.Allocate();
  const std::size_t count = value.Count();
  std::minstd_rand noise(static_cast<unsigned>(1 + draw.Byte()));
  for (std::size_t i = 0; i < count; ++i) {
    if (type == kFloat) {
      const float number = scales ? draw.Scale() : 0.01F * static_cast<float>(static_cast<int>(noise() % 1000) - 400);
      std::memcpy(value.data.get() + 4 * i, &number, 4);
    } else if (type == kInt32) {
      const auto number = static_cast<std::int32_t>(noise());
      std::memcpy(value.data.get() + 4 * i, &number, 4);
    } else {
      value.data[i] = static_cast<unsigned char>(noise() >> 8);
    }
  }
  return value;
}

void AddLutInputs(Draw& draw, Node* node, std::int64_t outputs, std::int64_t terms, std::int64_t bits,
                  bool float_output = false) {
  node->inputs.push_back(Tensor(draw, kFloat, {}, true));
  node->inputs.push_back(Tensor(draw, node->x_type, {}));
  node->inputs.push_back(Tensor(draw, kUint8, {outputs, (terms * bits + 7) / 8}));
  node->inputs.push_back(Tensor(draw, kInt8, {std::int64_t{1} << bits}));
  node->inputs.push_back(Tensor(draw, kFloat, {outputs}, true));
  node->inputs.push_back(Tensor(draw, float_output ? kFloat : kInt32, {outputs}));
  if (float_output) {
    return;
  }
  node->inputs.push_back(Tensor(draw, kFloat, {}, true));
  node->inputs.push_back(Tensor(draw, node->x_type, {}));
}

Node Convolution(Draw& draw) {
  Node node;
  node.name = "LutQLinearConv";
  node.x_type = draw.OneIn(2) ? kInt8 : kUint8;
  const std::int64_t rank = draw.Between(1, 2);
  const std::int64_t group = draw.OneIn(3) ? draw.Between(1, 9) : 1;
  const bool depthwise = draw.OneIn(4);
  const std::int64_t inner = depthwise ? 1 : draw.Between(1, 40);
  std::vector<std::int64_t> w = {group * (depthwise ? 1 : draw.Between(1, 70)), inner};
  std::vector<std::int64_t> x = {draw.Between(0, 2), group * inner};
  for (std::int64_t axis = 0; axis < rank; ++axis) {
    w.push_back(draw.Between(1, 5));
    x.push_back(draw.Between(0, 24));
    node.info.lists["strides"].push_back(draw.Between(1, 3));
    node.info.lists["dilations"].push_back(draw.Between(1, 3));
  }
  for (std::int64_t i = 0; i < 2 * rank; ++i) {
    node.info.lists["pads"].push_back(draw.Between(0, 4));
  }
  const std::int64_t bits = draw.OneIn(2) ? 2 : 4;
  std::int64_t terms = 1;
  for (std::size_t i = 1; i < w.size(); ++i) {
    terms *= w[i];
  }
  node.info.ints = {{"bits", bits}, {"group", group}};
  node.inputs.push_back(Tensor(draw, node.x_type, x));
  AddLutInputs(draw, &node, w[0], terms, bits);
  node.info.lists["w_shape"] = std::move(w);
  return node;
}

Node MatrixProduct(Draw& draw) {
  Node node;
  const bool float_output = draw.OneIn(2);
  node.name = float_output ? "LutMatMulIntegerToFloat" : "LutQLinearMatMul";
  node.x_type = draw.OneIn(2) ? kInt8 : kUint8;
  const std::int64_t outputs = draw.Between(1, 140);
  const std::int64_t terms = draw.Between(1, 200);
  const std::int64_t bits = draw.OneIn(2) ? 2 : 4;
  node.info.ints = {{"bits", bits}};
  node.info.lists["w_shape"] = {outputs, terms};
  std::vector<std::int64_t> x;
  for (std::int64_t axis = draw.Between(0, 3); axis > 0; --axis) {
    x.push_back(draw.Between(0, 12));
  }
  x.push_back(terms);
  node.inputs.push_back(Tensor(draw, node.x_type, x));
  AddLutInputs(draw, &node, outputs, terms, bits, float_output);
  return node;
}

Node Adaptive(Draw& draw) {
  Node node;
  const bool codes = draw.OneIn(2);
  node.name = codes ? "AdaptiveRequantize" : "AdaptiveQuantize";
  node.x_type = codes ? kUint8 : kFloat;
  std::vector<std::int64_t> x = {draw.Between(0, 3), draw.Between(1, 9)};
  for (std::int64_t axis = draw.Between(0, 2); axis > 0; --axis) {
    x.push_back(draw.Between(1, 40));
  }
  const std::int64_t features = draw.Between(1, 7);
  const std::int64_t hidden = draw.Between(1, 5);
  const std::int64_t columns = (features & 1) * x[1] + (features >> 1 & 1) + (features >> 2 & 1);
  node.inputs.push_back(Tensor(draw, node.x_type, x));
  if (codes) {
    node.inputs.push_back(Tensor(draw, kFloat, {}, true));
    node.inputs.push_back(Tensor(draw, kUint8, {}));
  }
  node.inputs.push_back(Tensor(draw, kFloat, {}, true));
  node.inputs.push_back(Tensor(draw, kUint8, {}));
  node.inputs.push_back(Tensor(draw, kFloat, {hidden, columns}));
  node.inputs.push_back(Tensor(draw, kFloat, {hidden}));
  node.inputs.push_back(Tensor(draw, kFloat, {1, hidden}));
  node.inputs.push_back(Tensor(draw, kFloat, {1}));
  node.info.ints = {{"features", features}, {"qmin", draw.Between(0, 3)}, {"qmax", draw.Between(4, 255)}};
  node.info.floats = {{"beta_min", draw.Scale()}, {"beta_max", 1.0F + draw.Scale()}};
  return node;
}

// left, left_scale, right and right_scale.
void AddAcross(Draw& draw, Node* node, std::int64_t channels, std::int64_t rank) {
  for (const auto& dims : {std::vector<std::int64_t>{rank, channels}, {rank}, {channels, rank}, {channels}}) {
    node->inputs.push_back(Tensor(draw, dims.size() == 2 ? kInt8 : kFloat, dims));
    OrtValue& made = node->inputs.back();
    for (std::size_t i = 0; made.type == kInt8 && i < made.Count(); ++i) {
      made.data[i] = made.data[i] == 128 ? 0 : made.data[i];
    }
  }
}

Node Border(Draw& draw) {
  Node node;
  node.name = "BorderQuantize";
  node.x_type = kFloat;
  const std::int64_t channels = draw.Between(1, 9);
  const std::int64_t rank = draw.OneIn(2) ? draw.Between(1, 4) : 0;
  const std::int64_t qmax = draw.Between(1, 255);
  std::vector<std::int64_t> x = {draw.Between(0, 2), channels};
  for (std::int64_t axis = draw.Between(0, 2); axis > 0; --axis) {
    x.push_back(draw.Between(0, 70));
  }
  node.inputs.push_back(Tensor(draw, kFloat, x));
  node.inputs.push_back(Tensor(draw, kFloat, {}, true));
  node.inputs.push_back(Tensor(draw, kUint8, {}));
  node.inputs.push_back(Tensor(draw, kFloat, {channels, draw.OneIn(2) ? qmax + 1 : 1}));
  OrtValue window = Tensor(draw, kInt8, {channels, 1 + 2 * draw.Between(0, 2), 1 + 2 * draw.Between(0, 2)});
  for (std::size_t i = 0; i < window.Count(); ++i) {
    window.data[i] = static_cast<unsigned char>(static_cast<int>(window.data[i] % 41) - 20);
  }
  node.inputs.push_back(std::move(window));
  node.inputs.push_back(Tensor(draw, kFloat, {channels}));
  AddAcross(draw, &node, channels, rank);
  node.info.ints = {{"channels", channels}, {"qmin", 0}, {"qmax", qmax}};
  return node;
}

// Any shape, and how many of its axes lie behind the one before the channels'.
std::vector<std::int64_t> LevelShape(Draw& draw, std::size_t* behind) {
  std::vector<std::int64_t> x;
  for (std::int64_t axis = draw.Between(1, 4); axis > 0; --axis) {
    x.push_back(draw.Between(0, 9));
  }
  x.push_back(draw.OneIn(2) ? draw.Between(1, 9) : draw.Between(10, 200));
  *behind = static_cast<std::size_t>(draw.Between(1, static_cast<std::int64_t>(x.size())));
  return x;
}

void AddLevelInputs(Draw& draw, Node* node, const std::vector<std::int64_t>& x, std::int64_t rows,
                    std::int64_t levels) {
  node->inputs.push_back(Tensor(draw, kUint8, x));
  node->inputs.push_back(Tensor(draw, kFloat, {}, true));
  node->inputs.push_back(Tensor(draw, kUint8, {}));
  node->inputs.push_back(Tensor(draw, kFloat, {}, true));
  node->inputs.push_back(Tensor(draw, kUint8, {}));
  OrtValue table = Tensor(draw, kUint8, {rows, levels});
  for (std::int64_t row = 0; row < rows; ++row) {
    std::sort(table.data.get() + row * levels, table.data.get() + (row + 1) * levels);
  }
  node->inputs.push_back(std::move(table));
}

Node Levels(Draw& draw) {
  Node node;
  node.name = "LutRequantize";
  std::size_t behind = 0;
  const std::vector<std::int64_t> x = LevelShape(draw, &behind);
  const std::int64_t channels = draw.OneIn(4) ? 1 : std::max<std::int64_t>(1, x[x.size() - behind]);
  AddLevelInputs(draw, &node, x, channels, draw.Between(2, 16));
  node.info.ints = {{"axis", -static_cast<std::int64_t>(behind)}};
  return node;
}

Node Feedback(Draw& draw) {
  Node node;
  node.name = "FeedbackRequantize";
  std::size_t behind = 0;
  std::vector<std::int64_t> x = LevelShape(draw, &behind);
  const std::int64_t cell = x.size() > 2 && draw.OneIn(2) ? draw.Between(1, 4) : 1;
  behind = cell > 1 ? 3 : behind;
  std::int64_t channels = std::max<std::int64_t>(2, x[x.size() - behind]);
  x[x.size() - behind] = channels;
  AddLevelInputs(draw, &node, x, draw.OneIn(3) ? 1 : channels, draw.Between(2, 16));
  channels *= cell * cell;
  OrtValue group = Tensor(draw, kUint8, {channels});
  const auto groups = static_cast<unsigned char>(draw.Between(1, 8));
  for (std::size_t i = 0; i < group.Count(); ++i) {
    group.data[i] = static_cast<unsigned char>(group.data[i] % groups);
  }
  node.inputs.push_back(std::move(group));
  AddAcross(draw, &node, channels, draw.OneIn(3) ? draw.Between(1, 70) : draw.Between(1, 9));
  node.info.ints = {{"axis", -static_cast<std::int64_t>(behind)}};
  if (cell > 1 || draw.OneIn(2)) {
    node.info.ints["cell"] = cell;
  }
  return node;
}

std::int64_t Nonsense(Draw& draw) {
  constexpr std::int64_t kValues[] = {-1, 0, 1, 2, 3, 5, 64, 2147483647, 2147483648, INT64_MAX, INT64_MIN};
  return kValues[draw.Byte() % (sizeof kValues / sizeof kValues[0])];
}

// One thing is made wrong, or at least different.
void Spoil(Draw& draw, Node* node) {
  switch (draw.Byte() % 5) {
    case 0: {  // the shape of an input
      OrtValue& input = node->inputs[draw.Byte() % node->inputs.size()];
      std::vector<std::int64_t> dims;
      for (std::int64_t axis = draw.Between(0, 9); axis > 0; --axis) {
        dims.push_back(draw.Between(0, 3));
      }
      input = Tensor(draw, input.type, std::move(dims));
      break;
    }
    case 1: {  // a number of an input
      OrtValue& input = node->inputs[draw.Byte() % node->inputs.size()];
      if (input.type == kFloat && input.Count() != 0) {
        constexpr float kValues[] = {0.0F, -1.0F, NAN, INFINITY, -INFINITY, 1e-45F, 3e38F, 1e-30F};
        std::memcpy(input.data.get() + draw.Byte() % input.Count() * 4, &kValues[draw.Byte() % 8], 4);
      }
      break;
    }
    case 2:  // an integer attribute
      for (auto& [name, value] : node->info.ints) {
        value = draw.OneIn(3) ? Nonsense(draw) : value;
      }
      break;
    case 3:  // a list
      for (auto& [name, values] : node->info.lists) {
        if (draw.OneIn(4)) {
          values.resize(static_cast<std::size_t>(draw.Between(0, 5)), 1);
        } else if (!values.empty()) {
          values[draw.Byte() % values.size()] = Nonsense(draw);
        }
      }
      break;
    default:  // an attribute is missing, or a float one is nonsense
      if (draw.OneIn(2) && !node->info.floats.empty()) {
        node->info.floats["beta_max"] = draw.OneIn(2) ? NAN : -1.0F;
      } else if (!node->info.ints.empty()) {
        node->info.ints.erase(node->info.ints.begin());
      }
  }
}

const OrtCustomOp* FindOp(const Node& node) {
  static OrtApi api = fake::MakeApi();
  static OrtSessionOptions options;
  if (options.domain == nullptr) {
    const OrtApiBase base = {[](std::uint32_t) -> const OrtApi* { return &api; }, [] { return "1.17.0"; }};
    if (OrtStatus* const status = RegisterCustomOps(&options, &base)) {
      std::fprintf(stderr, "%s\n", status->message.c_str());
      std::exit(2);
    }
  }
  for (const OrtCustomOp* const op : options.domain->ops) {
    if (op->GetName(op) == node.name && op->GetInputType(op, 0) == node.x_type) {
      return op;
    }
  }
  std::fprintf(stderr, "no operator %s\n", node.name.c_str());
  std::exit(2);
}

// Whether it ran; the outputs if so.
bool RunNode(Node& node, bool constants, std::vector<OrtValue>* outputs) {
  static OrtApi api = fake::MakeApi();
  const OrtCustomOp* const op = FindOp(node);
  node.info.inputs = &node.inputs;
  node.info.constants = constants;
  void* kernel = nullptr;
  OrtStatus* status = op->CreateKernelV2(op, &api, &node.info, &kernel);
  for (int repeat = 0; status == nullptr && repeat < 2; ++repeat) {
    OrtKernelContext context;
    context.inputs = &node.inputs;
    context.outputs.resize(op->GetOutputTypeCount(op));
    for (std::size_t i = 0; i < context.outputs.size(); ++i) {
      context.outputs[i].type = op->GetOutputType(op, i);
    }
    status = op->KernelComputeV2(kernel, &context);
    *outputs = std::move(context.outputs);
  }
  if (kernel != nullptr) {
    op->KernelDestroy(kernel);
  }
  const bool ran = status == nullptr;
  if (!ran && status->message.rfind(node.name, 0) != 0) {
    std::fprintf(stderr, "a sentence does not name its operator: %s\n", status->message.c_str());
    std::abort();
  }
  delete status;
  return ran;
}

bool RunBytes(const std::uint8_t* data, std::size_t size) {
  Draw draw(data, size);
  constexpr Node (*kMakers[])(Draw&) = {Convolution, MatrixProduct, Adaptive, Border, Levels, Feedback};
  Node node = kMakers[draw.Byte() % 6](draw);
  if (draw.OneIn(2)) {
    Spoil(draw, &node);
  }
  std::vector<OrtValue> first;
  std::vector<OrtValue> second;
  const bool ran = RunNode(node, true, &first);
  const bool again = RunNode(node, false, &second);
  bool equal = ran == again;
  for (std::size_t i = 0; ran && equal && i < first.size(); ++i) {
    const std::size_t bytes = first[i].Count() * first[i].ElementSize();
    equal = first[i].dims == second[i].dims &&
            (bytes == 0 || std::memcmp(first[i].data.get(), second[i].data.get(), bytes) == 0);
  }
  if (!equal) {
    std::fprintf(stderr, "%s: constants and run-time inputs disagree\n", node.name.c_str());
    std::abort();
  }
  return ran;
}

}  // namespace

#if defined(POSTQUANT_LIBFUZZER)
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  RunBytes(data, size);
  return 0;
}
#else
int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: fuzz_operators SEED SECONDS MOST\n");
    return 2;
  }
  std::mt19937 random(static_cast<unsigned>(std::strtoul(arguments[1], nullptr, 10)));
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::strtol(arguments[2], nullptr, 10));
  const long most = std::strtol(arguments[3], nullptr, 10);
  long runs = 0;
  long ran = 0;
  std::vector<std::uint8_t> bytes(512);
  for (; runs < most && std::chrono::steady_clock::now() < end; ++runs) {
    std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<std::uint8_t>(random()); });
    fuzz::SimulateLevels(random);
    ran += RunBytes(bytes.data(), bytes.size()) ? 1 : 0;
  }
  std::printf("ok %ld %ld\n", runs, ran);
  return 0;
}
#endif
