// The kernels of quantize_kernels.h for AVX2.
#include "quantize_body.h"

namespace postquant::quantize {

const Kernels& Avx2Kernels() { return kKernels; }

}  // namespace postquant::quantize
