// DCNv4 for every other processor.
#define DCNZOO_KERNELS "dcnv4_simd.h"
#include "kernels.h"
#include "portable.h"
