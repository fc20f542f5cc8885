#include "capability.h"

#include <cstdlib>
#include <string>

#include <torch/headeronly/util/Exception.h>

#if defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace dcnzoo::cpu {
namespace {

#if defined(_M_X64)
bool all(int bits, unsigned long long mask) { return (static_cast<unsigned>(bits) & mask) == mask; }

Capability best() {
  int leaf[4];
  __cpuid(leaf, 0);
  if (leaf[0] < 7) {
    return Capability::kPortable;
  }
  __cpuid(leaf, 1);
  constexpr unsigned kFma = 1u << 12, kOsxsave = 1u << 27, kF16c = 1u << 29;
  if (!all(leaf[2], kFma | kOsxsave | kF16c)) {
    return Capability::kPortable;
  }
  const unsigned long long saved = _xgetbv(0);  // the registers that the operating system keeps
  __cpuidex(leaf, 7, 0);
  constexpr unsigned kAvx2 = 1u << 5, kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  if ((saved & 0x6) != 0x6 || !all(leaf[1], kAvx2)) {
    return Capability::kPortable;
  }
  return (saved & 0xe6) == 0xe6 && all(leaf[1], kAvx512) ? Capability::kAvx512 : Capability::kAvx2;
}
#elif defined(__x86_64__)
Capability best() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {  // F16C is older than AVX2
    return Capability::kPortable;
  }
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? Capability::kAvx512
             : Capability::kAvx2;
}
#else
Capability best() { return Capability::kPortable; }
#endif

Capability choose() {
  const char* variable = std::getenv("DCNZOO_CPU_CAPABILITY");
  if (variable == nullptr || *variable == '\0') {
    return best();
  }
  const std::string name = variable;
  STD_TORCH_CHECK(
      name == "default" || name == "avx2" || name == "avx512",
      "DCNZOO_CPU_CAPABILITY must be default, avx2 or avx512, got ", name);
  const Capability wish =
      name == "avx512" ? Capability::kAvx512 : name == "avx2" ? Capability::kAvx2 : Capability::kPortable;
  STD_TORCH_CHECK(wish <= best(), "DCNZOO_CPU_CAPABILITY is ", name, ", which this processor lacks");
  return wish;
}

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace dcnzoo::cpu
