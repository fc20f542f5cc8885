// Multi-scale deformable attention for every other processor.
#define DCNZOO_KERNELS "deform_attn_simd.h"
#include "deform_attn_kernels.h"
#include "portable.h"
