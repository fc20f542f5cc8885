// Multi-scale deformable attention for x86-64 processors with AVX2.
#define DCNZOO_KERNELS "deform_attn_simd.h"
#include "deform_attn_kernels.h"
#include "x86.h"
