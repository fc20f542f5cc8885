// Depthwise convolution for x86-64 processors with AVX-512.
#define DCNZOO_AVX512
#define DCNZOO_KERNELS "depthwise_simd.h"
#include "depthwise_kernels.h"
#include "x86.h"
