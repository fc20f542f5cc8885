// Multi-scale deformable attention for every other processor: plain C++ that the compiler vectorises.
#include <cmath>

#include "deform_attn_kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 sees some where lanes are written one by one
#endif

namespace dcnzoo::cpu::portable {
namespace {
#include "simd_generic.h"
// This first.
#include "deform_attn_simd.h"

template <typename V>
using VectorFor = GenericVector<Accumulator<V>, 16 / sizeof(Accumulator<V>)>;
}  // namespace

template <typename V, typename O>
void attend(const AttentionForward<V, O>& call, int64_t begin, int64_t end) {
  attend_by_depth<VectorFor<V>>(call, begin, end);
}

template <typename V, typename O>
void attend_backward(const AttentionBackward<V, O>& call, int64_t bands, int64_t begin, int64_t end) {
  attend_backward_by_depth<VectorFor<V>>(call, bands, begin, end);
}

DCNZOO_INSTANTIATE_ATTENTION(float, float)
DCNZOO_INSTANTIATE_ATTENTION(double, double)
DCNZOO_INSTANTIATE_ATTENTION(Half, Half)
DCNZOO_INSTANTIATE_ATTENTION(Half, float)
DCNZOO_INSTANTIATE_ATTENTION(BFloat16, BFloat16)
DCNZOO_INSTANTIATE_ATTENTION(BFloat16, float)

}  // namespace dcnzoo::cpu::portable
