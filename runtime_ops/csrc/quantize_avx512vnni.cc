// The kernels of quantize_kernels.h for AVX-512 F, BW, DQ, VL and VNNI.
#include "quantize_body.h"

namespace postquant::quantize {

const Kernels& Avx512Kernels() { return kKernels; }

}  // namespace postquant::quantize
