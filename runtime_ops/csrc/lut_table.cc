// The table of each instruction set.
#include "lut_table.h"

namespace postquant::lut {

const KernelTable& TableOf(Isa isa) {
  switch (isa) {
#if defined(POSTQUANT_BUILD_X86)
    case Isa::kAvx2:
      return Avx2Table();
    case Isa::kAvxVnni:
      return AvxVnniTable();
    case Isa::kAvx512Vnni:
      return Avx512VnniTable();
    case Isa::kAvx512Vbmi:
      return Avx512VbmiTable();
#endif
#if defined(POSTQUANT_BUILD_AMX)
    case Isa::kAmx:
      return AmxTable();
#endif
#if defined(POSTQUANT_BUILD_NEONDOT)
    case Isa::kNeonDot:
      return NeonDotTable();
#endif
    default:
      return BaselineTable();
  }
}

}  // namespace postquant::lut
