// DCNv4 for x86-64 processors with AVX-512.
#define DCNZOO_AVX512
#define DCNZOO_KERNELS "dcnv4_simd.h"
#include "kernels.h"
#include "x86.h"
