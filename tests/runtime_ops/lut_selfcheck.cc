// Compares the look-up table kernels with a plain loop on random layers, on every instruction set of the machine, where
// there is no Python: under an emulator. Prints the sets and "ok", or the first difference.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "lut_kernels.h"

namespace {

using postquant::Isa;
using namespace postquant::lut;

struct Case {
  ConvGeometry geometry;
  bool matmul;
  std::int64_t rows, height, width;  // rows: also samples
  int bits;
  bool is_signed;
  bool floats;  // a matrix product with a float output
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  std::int64_t Between(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(high - low + 1));
  }

 private:
  std::mt19937_64 engine_;
};

struct Layer {
  std::vector<std::uint8_t> codes, packed, x;
  std::vector<std::int8_t> table;
  std::vector<float> w_scale, float_bias;
  std::vector<std::int32_t> bias;
  Numbers numbers;
};

std::int64_t Terms(const Case& c) {
  const ConvGeometry& g = c.geometry;
  return g.in_channels / g.group * g.kernel[0] * g.kernel[1];
}

Layer MakeLayer(const Case& c, Random* random) {
  Layer layer;
  const std::int64_t terms = Terms(c);
  const std::int64_t row_bytes = (terms * c.bits + 7) / 8;
  layer.packed.assign(static_cast<std::size_t>(c.geometry.out_channels * row_bytes), 0);
  for (std::int64_t m = 0; m < c.geometry.out_channels; ++m) {
    for (std::int64_t k = 0; k < terms; ++k) {
      const auto code = static_cast<std::uint8_t>(random->Between(0, (1 << c.bits) - 1));
      layer.codes.push_back(code);
      auto& byte = layer.packed[static_cast<std::size_t>(m * row_bytes + k * c.bits / 8)];
      byte = static_cast<std::uint8_t>(byte | (code << (k * c.bits % 8)));
    }
    layer.w_scale.push_back(static_cast<float>(random->Between(50, 200)) / 100.0F);
    layer.bias.push_back(static_cast<std::int32_t>(random->Between(-9000, 9000)));
    layer.float_bias.push_back(static_cast<float>(random->Between(-9000, 9000)) / 7.0F);
  }
  for (int i = 0; i < (1 << c.bits); ++i) {
    layer.table.push_back(static_cast<std::int8_t>(random->Between(-128, 127)));
  }
  for (std::int64_t i = 0; i < c.rows * c.geometry.in_channels * c.height * c.width; ++i) {
    layer.x.push_back(static_cast<std::uint8_t>(random->Between(0, 255)));
  }
  const int low = c.is_signed ? -128 : 0;
  layer.numbers = {0.05F,
                   static_cast<std::int32_t>(random->Between(low, low + 255)),
                   c.is_signed,
                   0.05F * 150.0F * std::sqrt(static_cast<float>(terms)),
                   static_cast<std::int32_t>(random->Between(low, low + 255)),
                   c.is_signed,
                   layer.w_scale.data(),
                   layer.bias.data(),
                   c.floats ? layer.float_bias.data() : nullptr};
  return layer;
}

// The output as a float, which holds every code exactly.
float Expected(const Case& c, const Layer& layer, std::int64_t n, std::int64_t m, std::int64_t oy, std::int64_t ox) {
  const ConvGeometry& g = c.geometry;
  const std::int64_t channels = g.in_channels / g.group;
  const std::int64_t first = m / (g.out_channels / g.group) * channels;
  std::int64_t sum = c.floats ? 0 : layer.bias[static_cast<std::size_t>(m)];
  std::size_t at = static_cast<std::size_t>(m * Terms(c));
  for (std::int64_t channel = 0; channel < channels; ++channel) {
    for (std::int64_t ky = 0; ky < g.kernel[0]; ++ky) {
      for (std::int64_t kx = 0; kx < g.kernel[1]; ++kx, ++at) {
        const std::int64_t y = oy * g.stride[0] + ky * g.dilation[0] - g.pad_begin[0];
        const std::int64_t x = ox * g.stride[1] + kx * g.dilation[1] - g.pad_begin[1];
        if (y < 0 || y >= c.height || x < 0 || x >= c.width) {
          continue;
        }
        const std::uint8_t raw = layer.x[static_cast<std::size_t>(
            ((n * g.in_channels + first + channel) * c.height + y) * c.width + x)];
        const std::int64_t code = c.is_signed ? std::int64_t{static_cast<std::int8_t>(raw)} : std::int64_t{raw};
        sum += (code - layer.numbers.x_zero_point) * layer.table[layer.codes[at]];
      }
    }
  }
  const float product = layer.numbers.x_scale * layer.w_scale[static_cast<std::size_t>(m)];
  if (c.floats) {
    const float scaled = static_cast<float>(static_cast<std::int32_t>(sum)) * product;
    return scaled + layer.float_bias[static_cast<std::size_t>(m)];
  }
  const float factor = product / layer.numbers.y_scale;
  const float value = std::nearbyint(static_cast<float>(static_cast<std::int32_t>(sum)) * factor);
  const int low = c.is_signed ? -128 : 0;
  const float shifted = value + static_cast<float>(layer.numbers.y_zero_point);
  return std::fmin(std::fmax(shifted, static_cast<float>(low)), static_cast<float>(low + 255));
}

float Found(const Case& c, const std::vector<std::uint8_t>& y, std::size_t at) {
  if (c.floats) {
    float value = 0;
    std::memcpy(&value, y.data() + at * sizeof value, sizeof value);
    return value;
  }
  return c.is_signed ? static_cast<float>(static_cast<std::int8_t>(y[at])) : static_cast<float>(y[at]);
}

// Whether the kernels of `isa` give what is expected.
bool Check(const Case& c, const Layer& layer, Isa isa) {
  const Codes codes = {layer.packed.data(), c.bits, layer.table.data()};
  const ConvGeometry& g = c.geometry;
  WeightsPtr weights;
  RequantizerPtr requantizer;
  Plan plan;
  Status status = c.matmul ? PrepareMatMul(codes, g.out_channels, g.in_channels, &isa, &weights)
                           : PrepareConv(codes, g, &isa, &weights);
  if (status == Status::kOk) {
    status = PrepareRequantizer(*weights, layer.numbers, &requantizer);
  }
  if (status == Status::kOk) {
    status = c.matmul ? PlanMatMul(*weights, *requantizer, c.rows, &plan)
                      : PlanConv(*weights, *requantizer, c.rows, c.height, c.width, &plan);
  }
  if (status != Status::kOk) {
    std::printf("status %d\n", static_cast<int>(status));
    return false;
  }
  const std::int64_t out_height = c.matmul ? 1 : plan.out_size[0];
  const std::int64_t out_width = c.matmul ? 1 : plan.out_size[1];
  const auto count = static_cast<std::size_t>(c.rows * g.out_channels * out_height * out_width);
  std::vector<std::uint8_t> y(count * (c.floats ? sizeof(float) : 1));
  std::vector<std::uint8_t> workspace(plan.workspace);
  for (int phase = 0; phase < kPhases; ++phase) {
    Run(*weights, *requantizer, plan, phase, 0, plan.items[phase], layer.x.data(), y.data(), workspace.data());
  }
  std::size_t at = 0;
  for (std::int64_t n = 0; n < c.rows; ++n) {
    for (std::int64_t m = 0; m < g.out_channels; ++m) {
      for (std::int64_t oy = 0; oy < out_height; ++oy) {
        for (std::int64_t ox = 0; ox < out_width; ++ox, ++at) {
          const float expected = Expected(c, layer, n, m, oy, ox);
          const float found = Found(c, y, at);
          if (found != expected) {
            std::printf("%s: sample %d channel %d at %d, %d: %.9g, expected %.9g\n", postquant::IsaName(isa),
                        static_cast<int>(n), static_cast<int>(m), static_cast<int>(oy), static_cast<int>(ox),
                        static_cast<double>(found), static_cast<double>(expected));
            return false;
          }
        }
      }
    }
  }
  return true;
}

Case RandomCase(Random* random, int index) {
  Case c = {};
  ConvGeometry& g = c.geometry;
  c.bits = index % 2 == 0 ? 4 : 2;
  c.is_signed = index % 3 == 0;
  c.matmul = index % 4 == 0;
  c.floats = index % 8 == 4;
  g = {random->Between(1, 70), random->Between(1, 90), 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {0, 0}};
  c.rows = c.matmul ? random->Between(1, 20) : random->Between(1, 2);
  c.height = c.width = 1;
  if (c.matmul) {
    return c;
  }
  if (index % 4 == 1) {  // depthwise
    g.group = random->Between(1, 9);
    g.in_channels = g.group;
    g.out_channels = g.group * random->Between(1, 2);
  } else {
    g.group = random->Between(1, 2);
    g.in_channels = g.group * random->Between(1, 40);
    g.out_channels = g.group * random->Between(1, 40);
  }
  std::int64_t* const sizes[2] = {&c.height, &c.width};
  for (int axis = 0; axis < 2; ++axis) {
    g.kernel[axis] = random->Between(1, 5);
    g.stride[axis] = random->Between(1, 3);
    g.dilation[axis] = random->Between(1, 3);
    g.pad_begin[axis] = random->Between(0, 3);
    g.pad_end[axis] = random->Between(0, 3);
    const std::int64_t reach = (g.kernel[axis] - 1) * g.dilation[axis] + 1 - g.pad_begin[axis] - g.pad_end[axis];
    *sizes[axis] = (reach > 1 ? reach : 1) + random->Between(0, 20);
  }
  return c;
}

}  // namespace

int main() {
  for (const Isa isa : postquant::kAllIsas) {
    if (!postquant::IsaAvailable(isa)) {
      continue;
    }
    Random random(7);
    for (int index = 0; index < 80; ++index) {
      const Case c = RandomCase(&random, index);
      if (!Check(c, MakeLayer(c, &random), isa)) {
        return 1;
      }
    }
    std::printf("%s ", postquant::IsaName(isa));
  }
  std::printf("ok\n");
  return 0;
}
