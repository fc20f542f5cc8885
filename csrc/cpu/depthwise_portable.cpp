// Depthwise convolution for every other processor.
#define DCNZOO_KERNELS "depthwise_simd.h"
#include "depthwise_kernels.h"
#include "portable.h"
