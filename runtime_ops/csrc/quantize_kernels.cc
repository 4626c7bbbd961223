#include "quantize_kernels.h"

#include "isa.h"

namespace postquant::quantize {

const Kernels& SelectedKernels() {
  switch (SelectedIsa()) {
#if defined(POSTQUANT_BUILD_X86)
    case Isa::kAvx2:
    case Isa::kAvxVnni:
      return Avx2Kernels();
    case Isa::kAvx512Vnni:
    case Isa::kAvx512Vbmi:
    case Isa::kAmx:
      return Avx512Kernels();
#endif
    default:
      return BaselineKernels();
  }
}

}  // namespace postquant::quantize
