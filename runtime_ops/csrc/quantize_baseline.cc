// The kernels of quantize_kernels.h for what the compiler assumes for the platform.
#include "quantize_body.h"

namespace postquant::quantize {

const Kernels& BaselineKernels() { return kKernels; }

}  // namespace postquant::quantize
