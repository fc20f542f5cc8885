// Depthwise convolution for x86-64 processors with AVX2.
#define DCNZOO_KERNELS "depthwise_simd.h"
#include "depthwise_kernels.h"
#include "x86.h"
