// Depthwise convolution for every other processor: plain C++ that the compiler vectorises.
#include <cmath>

#include "depthwise_kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 sees some where lanes are written one by one
#endif

namespace dcnzoo::cpu::portable {
namespace {
#include "simd_generic.h"

template <typename V>
using VectorFor = GenericVector<Accumulator<V>, 16 / sizeof(Accumulator<V>)>;
}  // namespace
#include "depthwise_simd.h"
}  // namespace dcnzoo::cpu::portable
