// Which instruction set the CPU kernels use.
#pragma once

namespace dcnzoo::cpu {

enum class Capability { kPortable, kAvx2, kAvx512 };

// The best that this processor has, or the one that the environment variable DCNZOO_CPU_CAPABILITY names: default, avx2 or
// avx512. Throws where the variable names another one, or one that the processor lacks.
Capability capability();

}  // namespace dcnzoo::cpu
