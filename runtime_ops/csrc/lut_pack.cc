// From codes to the layouts of lut_table.h, once, at load.
#include <cstring>

#include "lut_weights.h"

namespace postquant::lut {
namespace {

// Codes of one output.
class CodeRow {
 public:
  CodeRow(const Codes& codes, std::int64_t inputs, std::int64_t output)
      : row_(codes.data + output * DivideUp(inputs * codes.bits, 8)),
        bits_(codes.bits),
        mask_((1U << codes.bits) - 1U) {}

  std::uint8_t operator[](std::int64_t k) const {
    const std::int64_t bit = k * bits_;
    return static_cast<std::uint8_t>((static_cast<unsigned>(row_[bit / 8]) >> (bit % 8)) & mask_);
  }

 private:
  const std::uint8_t* row_;
  int bits_;
  unsigned mask_;
};

// Position of element `e` of run (i, j) in a row of codes, which is ordered (channel, kernel row, kernel column).
std::int64_t CodeIndex(const Weights& w, std::int64_t i, std::int64_t j, std::int64_t e) {
  if (w.method == Method::kMatMul) {
    return e;
  }
  const std::int64_t channels = w.geometry.in_channels / w.geometry.group;
  const std::int64_t column = w.runs[1] == 1 ? e / channels : j;
  return ((e % channels) * w.geometry.kernel[0] + i) * w.geometry.kernel[1] + column;
}

void PutLevel(const Weights& w, std::uint8_t* panel, std::int64_t word, std::int64_t place, std::int64_t element,
              std::int8_t level) {
  std::uint8_t* const at = panel + (word * w.table->panel_width + place) * static_cast<std::int64_t>(kWord);
  if (ElementBytes(*w.table) == 1) {
    std::memcpy(at + element, &level, 1);
  } else {
    const std::int16_t wide = level;
    std::memcpy(at + 2 * element, &wide, 2);
  }
}

// Word and element in it at which element `e` of run number `run` stands in a panel.
void PutRunLevel(const Weights& w, std::uint8_t* panel, std::int64_t run, std::int64_t e, std::int64_t place,
                 std::int8_t level) {
  const std::int64_t elements = w.WordElements();
  if (w.table->tight) {
    const std::int64_t at = run * w.run_elements + e;
    PutLevel(w, panel, at / elements, place, at % elements, level);
  } else {
    PutLevel(w, panel, run * DivideUp(w.run_elements, elements) + e / elements, place, e % elements, level);
  }
}

// Levels of one output, number `place` of its tile (see lut_planar.h).
void PutTileLevels(const Weights& w, const CodeRow& row, std::int64_t place, std::uint8_t* tile) {
  const std::int64_t taps = w.geometry.kernel[0] * w.geometry.kernel[1];
  for (std::int64_t k = 0; k < w.inputs; ++k) {
    const std::int64_t channel = k / taps;
    const std::int64_t word = k % taps * ChannelGroups(w) + channel / kPlanarChannels;
    const std::int64_t at = (word * kPlanarRows + place) * kPlanarChannels + channel % kPlanarChannels;
    std::memcpy(tile + at, &w.levels[row[k]], 1);
  }
}

}  // namespace

void SetLevels(const Codes& codes, Weights* w) {
  w->bits = codes.bits;
  for (int i = 0; i < kLevels; ++i) {
    w->levels[i] = codes.table[i & ((1 << codes.bits) - 1)];
  }
}

// Sizes of panels. False if they do not fit in memory's numbers.
bool SetSizes(Weights* w) {
  const std::int64_t width = w->Width();
  const std::int64_t elements = w->WordElements();
  std::int64_t runs = 0;
  std::int64_t total = 0;
  if (!Multiply(w->runs[0], w->runs[1], &runs) || !Multiply(runs, w->run_elements + elements, &total)) {
    return false;
  }
  const std::int64_t words =
      w->method == Method::kPlanar ? w->geometry.kernel[0] * w->geometry.kernel[1] * ChannelGroups(*w)
      : w->table->tight ? RoundUp(DivideUp(runs * w->run_elements, elements), w->table->panel_words)
                      : runs * DivideUp(w->run_elements, elements);
  w->group_panels = DivideUp(w->group_outputs, width);
  w->packed_steps = DivideUp(w->inputs, w->CodesPerStep());
  w->packed_bytes = w->packed_steps * width * elements;
  std::int64_t all = 0;
  return Multiply(words, width * static_cast<std::int64_t>(kWord), &w->panel_bytes) &&
         Multiply(w->panel_bytes, w->group_panels, &all) && Multiply(all, w->geometry.group, &all);
}

Status SetCodeSums(const Codes& codes, Weights* w) {
  std::int64_t size = 0;
  if (!Multiply(w->outputs, static_cast<std::int64_t>(sizeof(std::int32_t)), &size)) {
    return Status::kBadShape;
  }
  w->code_sums = AllocateZeros(size);
  if (!w->code_sums) {
    return Status::kOutOfMemory;
  }
  for (std::int64_t m = 0; m < w->outputs; ++m) {
    const CodeRow row(codes, w->inputs, m);
    std::uint32_t sum = 0;
    for (std::int64_t k = 0; k < w->inputs; ++k) {
      sum += static_cast<std::uint32_t>(static_cast<std::int32_t>(w->levels[row[k]]));
    }
    std::memcpy(w->code_sums.get() + m * static_cast<std::int64_t>(sizeof sum), &sum, sizeof sum);
  }
  return Status::kOk;
}

Status Decode(const Codes& codes, Weights* w) {
  w->decoded = AllocateZeros(w->geometry.group * w->group_panels * w->panel_bytes);
  if (!w->decoded) {
    return Status::kOutOfMemory;
  }
  const std::int64_t width = w->Width();
  for (std::int64_t m = 0; m < w->outputs; ++m) {
    const CodeRow row(codes, w->inputs, m);
    const std::int64_t inside = m % w->group_outputs;
    std::uint8_t* const panel =
        w->decoded.get() + (m / w->group_outputs * w->group_panels + inside / width) * w->panel_bytes;
    if (w->method == Method::kPlanar) {
      PutTileLevels(*w, row, inside % width, panel);
      continue;
    }
    for (std::int64_t i = 0; i < w->runs[0]; ++i) {
      for (std::int64_t j = 0; j < w->runs[1]; ++j) {
        for (std::int64_t e = 0; e < w->run_elements; ++e) {
          PutRunLevel(*w, panel, i * w->runs[1] + j, e, inside % width, w->levels[row[CodeIndex(*w, i, j, e)]]);
        }
      }
    }
  }
  return Status::kOk;
}

Status Pack(const Codes& codes, Weights* w) {
  w->packed = AllocateZeros(w->group_panels * w->packed_bytes);
  if (!w->packed) {
    return Status::kOutOfMemory;
  }
  const std::int64_t width = w->table->panel_width;
  const std::int64_t elements = w->WordElements();
  const std::int64_t parts = 8 / w->bits;
  for (std::int64_t n = 0; n < w->outputs; ++n) {
    const CodeRow row(codes, w->inputs, n);
    std::uint8_t* const panel = w->packed.get() + n / width * w->packed_bytes + n % width * elements;
    for (std::int64_t k = 0; k < w->inputs; ++k) {
      const std::int64_t word = k / elements;
      std::uint8_t* const byte = panel + word / parts * width * elements + k % elements;
      *byte = static_cast<std::uint8_t>(*byte | (row[k] << (word % parts * w->bits)));
    }
  }
  return Status::kOk;
}

Status SetTaps(const Codes& codes, Weights* w) {
  const std::int64_t width = RoundUp(w->geometry.kernel[1], 4);
  const std::int64_t taps = w->geometry.kernel[0] * width;
  std::int64_t size = 0;
  if (!Multiply(w->outputs, taps, &size)) {
    return Status::kBadShape;
  }
  w->taps = AllocateZeros(size);
  if (!w->taps) {
    return Status::kOutOfMemory;
  }
  for (std::int64_t m = 0; m < w->outputs; ++m) {
    const CodeRow row(codes, w->inputs, m);
    for (std::int64_t k = 0; k < w->inputs; ++k) {
      const std::int64_t at = m * taps + k / w->geometry.kernel[1] * width + k % w->geometry.kernel[1];
      std::memcpy(w->taps.get() + at, &w->levels[row[k]], 1);
    }
  }
  return Status::kOk;
}

Status EnsureDecoded(const Weights& w) {
  const std::lock_guard<std::mutex> lock(w.decoding);
  if (w.decoded) {
    return Status::kOk;
  }
  Bytes decoded = AllocateZeros(w.group_panels * w.panel_bytes);
  if (!decoded) {
    return Status::kOutOfMemory;
  }
  const std::int64_t width = w.table->panel_width;
  const std::int64_t elements = w.WordElements();
  const std::int64_t parts = 8 / w.bits;
  for (std::int64_t panel = 0; panel < w.group_panels; ++panel) {
    const std::uint8_t* const packed = w.packed.get() + panel * w.packed_bytes;
    std::uint8_t* const to = decoded.get() + panel * w.panel_bytes;
    for (std::int64_t word = 0; word < DivideUp(w.inputs, elements); ++word) {
      const std::uint8_t* const step = packed + word / parts * width * elements;
      const std::int64_t shift = word % parts * w.bits;
      const std::int64_t count = w.inputs - word * elements < elements ? w.inputs - word * elements : elements;
      for (std::int64_t place = 0; place < width; ++place) {
        for (std::int64_t e = 0; e < count; ++e) {
          const int code = (step[place * elements + e] >> shift) & ((1 << w.bits) - 1);
          PutLevel(w, to, word, place, e, w.levels[code]);
        }
      }
    }
  }
  w.decoded = std::move(decoded);
  return Status::kOk;
}

}  // namespace postquant::lut
