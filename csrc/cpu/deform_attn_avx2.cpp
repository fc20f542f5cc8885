// Multi-scale deformable attention for x86-64 processors with AVX2, FMA and F16C.
#include <cmath>

#include "deform_attn_kernels.h"

#ifdef DCNZOO_X86_64
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 sees some in its own intrinsics
#pragma GCC target("avx2,fma,f16c")
#endif

namespace dcnzoo::cpu::avx2 {
namespace {
#include "simd_generic.h"
#include "simd_avx2.h"
// These first.
#include "deform_attn_simd.h"

template <typename V>
using VectorFor = std::conditional_t<std::is_same_v<V, double>, GenericVector<double, 4>, FloatVector>;
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

}  // namespace dcnzoo::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
