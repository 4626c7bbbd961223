// Detection of instruction sets: the processor must have them and the operating system must save their registers.
#include "isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#define POSTQUANT_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace postquant {
namespace {

constexpr const char* kVariable = "POSTQUANT_ISA";

#if defined(POSTQUANT_X86)

struct Registers {
  std::uint32_t eax, ebx, ecx, edx;
};

Registers CpuId(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r = {0, 0, 0, 0};
#if defined(_MSC_VER)
  int values[4];
  __cpuid(values, 0);
  if (static_cast<std::uint32_t>(values[0]) >= leaf) {
    __cpuidex(values, static_cast<int>(leaf), static_cast<int>(subleaf));
    r = {static_cast<std::uint32_t>(values[0]), static_cast<std::uint32_t>(values[1]),
         static_cast<std::uint32_t>(values[2]), static_cast<std::uint32_t>(values[3])};
  }
#else
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) {
    r = {0, 0, 0, 0};
  }
#endif
  return r;
}

// XCR0: which register files the operating system saves.
std::uint64_t SavedStates() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

// Linux gives a process the tile registers on request only.
bool RequestTiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool Bit(std::uint32_t value, int bit) { return ((value >> bit) & 1U) != 0; }

bool Detect(Isa isa) {
  const Registers basic = CpuId(1, 0);
  if (!Bit(basic.ecx, 27)) {  // OSXSAVE
    return isa == Isa::kBaseline;
  }
  const std::uint64_t saved = SavedStates();
  const Registers extended = CpuId(7, 0);
  const bool avx2 = (saved & 0x6) == 0x6 && Bit(basic.ecx, 28) && Bit(extended.ebx, 5);
  const bool avx512 = avx2 && (saved & 0xe6) == 0xe6 && Bit(extended.ebx, 16) && Bit(extended.ebx, 17) &&
                      Bit(extended.ebx, 30) && Bit(extended.ebx, 31) && Bit(extended.ecx, 11);
  const bool vbmi = avx512 && Bit(extended.ecx, 1);
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvxVnni:
      return avx2 && Bit(CpuId(7, 1).eax, 4);
    case Isa::kAvx512Vnni:
      return avx512;
    case Isa::kAvx512Vbmi:
      return vbmi;
    case Isa::kAmx:
      return vbmi && (saved & 0x60000) == 0x60000 && Bit(extended.edx, 24) && Bit(extended.edx, 25) && RequestTiles();
    default:
      return false;
  }
}

#elif defined(__aarch64__) && defined(__linux__)

bool Detect(Isa isa) {
  constexpr unsigned long kDotProduct = 1UL << 20;  // HWCAP_ASIMDDP
  return isa == Isa::kBaseline || (isa == Isa::kNeonDot && (getauxval(AT_HWCAP) & kDotProduct) != 0);
}

#else

bool Detect(Isa isa) {
#if defined(__ARM_FEATURE_DOTPROD)
  return isa == Isa::kBaseline || isa == Isa::kNeonDot;
#else
  return isa == Isa::kBaseline;
#endif
}

#endif

bool Built(Isa isa) {
  switch (isa) {
    case Isa::kBaseline:
      return true;
#if defined(POSTQUANT_BUILD_X86)
    case Isa::kAvx2:
    case Isa::kAvxVnni:
    case Isa::kAvx512Vnni:
    case Isa::kAvx512Vbmi:
      return true;
#endif
#if defined(POSTQUANT_BUILD_AMX)
    case Isa::kAmx:
      return true;
#endif
#if defined(POSTQUANT_BUILD_NEONDOT)
    case Isa::kNeonDot:
      return true;
#endif
    default:
      return false;
  }
}

struct Choice {
  bool available[sizeof(kAllIsas) / sizeof(kAllIsas[0])];
  Isa selected;
  const char* problem;
};

Choice Choose() {
  Choice choice = {{}, Isa::kBaseline, nullptr};
  for (const Isa isa : kAllIsas) {
    choice.available[static_cast<int>(isa)] = Built(isa) && Detect(isa);
    if (choice.available[static_cast<int>(isa)]) {
      choice.selected = isa;
    }
  }
  const char* const wanted = std::getenv(kVariable);
  if (wanted == nullptr || *wanted == '\0') {
    return choice;
  }
  for (const Isa isa : kAllIsas) {
    if (std::strcmp(wanted, IsaName(isa)) == 0) {
      if (!choice.available[static_cast<int>(isa)]) {
        choice.problem = "POSTQUANT_ISA names an instruction set that this machine or this build of the library lacks";
      }
      for (const Isa lower : kAllIsas) {
        if (lower <= isa && choice.available[static_cast<int>(lower)]) {
          choice.selected = lower;
        }
      }
      return choice;
    }
  }
  choice.problem =
      "POSTQUANT_ISA must be one of baseline, neondot, avx2, avxvnni, avx512vnni, avx512vbmi, amx, or unset";
  return choice;
}

const Choice& TheChoice() {
  static const Choice choice = Choose();
  return choice;
}

}  // namespace

bool IsaAvailable(Isa isa) { return TheChoice().available[static_cast<int>(isa)]; }

Isa SelectedIsa() { return TheChoice().selected; }

const char* IsaProblem() { return TheChoice().problem; }

const char* IsaName(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "neondot", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx"};
  return kNames[static_cast<int>(isa)];
}

}  // namespace postquant
