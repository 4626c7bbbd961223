// Which instruction sets this machine has, and which one the kernels use.
//
// The best set is taken. For tests and measurements the environment variable POSTQUANT_ISA names a lower one:
// baseline, avx2, avxvnni, avx512vnni, avx512vbmi, amx, neondot. It is read once, at first use.
#ifndef POSTQUANT_CSRC_ISA_H_
#define POSTQUANT_CSRC_ISA_H_

namespace postquant {

// From the most general to the fastest.
enum class Isa {
  kBaseline,    // what the compiler assumes for the platform
  kNeonDot,     // AArch64 with the dot product instructions
  kAvx2,        // AVX2
  kAvxVnni,     // AVX2 and 256-bit VNNI
  kAvx512Vnni,  // AVX-512 F, BW, DQ, VL and VNNI
  kAvx512Vbmi,  // the same and VBMI (byte permutations)
  kAmx,         // the same and AMX tiles of int8
};
constexpr Isa kAllIsas[] = {Isa::kBaseline,   Isa::kNeonDot,    Isa::kAvx2, Isa::kAvxVnni,
                            Isa::kAvx512Vnni, Isa::kAvx512Vbmi, Isa::kAmx};

// Whether this build holds kernels for the set and this machine can run them.
bool IsaAvailable(Isa isa);

// The set in use: the one asked for, or the best available one before it in the list above; the best one of all if none
// is asked for or its name is unknown.
Isa SelectedIsa();

// Null, or a sentence that says why what POSTQUANT_ISA asks for cannot be had.
const char* IsaProblem();

// "avx2" and so on.
const char* IsaName(Isa isa);

}  // namespace postquant

#endif  // POSTQUANT_CSRC_ISA_H_
