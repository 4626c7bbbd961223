// BorderQuantize on a strip: some rows of one sample, of one channel or, where channels are mixed, of all of them.
//
// The strip's quotients and residuals are computed once, with the rows above and below that a window reaches; then the
// border of every value follows from sums over them.
#ifndef POSTQUANT_CSRC_BORDER_STRIP_H_
#define POSTQUANT_CSRC_BORDER_STRIP_H_

#include <cstddef>
#include <cstdint>

#include "border_coefficients.h"
#include "quantize_kernels.h"

namespace postquant {

// How an image is cut. Sizes are in elements of 4 bytes within the scratch memory of one strip.
struct StripPlan {
  // `height` and `width` of the image, at least 1.
  StripPlan(const BorderCoefficients& coefficients, std::size_t height, std::size_t width);

  bool mixed;              // all channels together
  std::size_t height;
  std::size_t width;
  std::size_t above;       // rows that a window reaches beyond a strip, on either side
  std::size_t stride;      // of a row with the columns that a window reaches beyond it
  std::size_t rows;        // of a strip
  std::size_t strips;      // of an image
  std::size_t points;      // room for the values of a strip and its neighbouring rows, in one channel
  std::size_t channels;    // of a strip
  std::size_t scratch;     // bytes
};

// Quantizes strip `strip` of channel `channel` (of all channels if mixed) of an image [channels, height, width].
void QuantizeStrip(const BorderCoefficients& coefficients, const StripPlan& plan, const quantize::Kernels& kernels,
                   std::size_t channel, std::size_t strip, const float* x, std::uint8_t* y, void* scratch) noexcept;

}  // namespace postquant

#endif  // POSTQUANT_CSRC_BORDER_STRIP_H_
