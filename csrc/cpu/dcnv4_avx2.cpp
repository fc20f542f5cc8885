// DCNv4 for x86-64 processors with AVX2.
#define DCNZOO_KERNELS "dcnv4_simd.h"
#include "kernels.h"
#include "x86.h"
