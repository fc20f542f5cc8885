// Multi-scale deformable attention for x86-64 processors with AVX-512.
#define DCNZOO_AVX512
#define DCNZOO_KERNELS "deform_attn_simd.h"
#include "deform_attn_kernels.h"
#include "x86.h"
