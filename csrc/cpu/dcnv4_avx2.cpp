// The kernels for x86-64 processors with AVX2, FMA and F16C.
#include <cmath>

#include "kernels.h"

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
#include "dcnv4_points.h"
// And then
#include "dcnv4_backward.h"
#include "dcnv4_forward.h"

template <typename V>
using VectorFor = std::conditional_t<std::is_same_v<V, double>, GenericVector<double, 4>, FloatVector>;
}  // namespace

template <typename V, typename O>
void forward_pixels(const Forward<V, O>& call, int64_t begin, int64_t end) {
  forward<VectorFor<V>>(call, begin, end);
}

template <typename V, typename O>
void backward_units(const Backward<V, O>& call, int64_t bands, int64_t begin, int64_t end) {
  backward<VectorFor<V>>(call, bands, begin, end);
}

DCNZOO_INSTANTIATE_KERNELS(float, float)
DCNZOO_INSTANTIATE_KERNELS(double, double)
DCNZOO_INSTANTIATE_KERNELS(Half, Half)
DCNZOO_INSTANTIATE_KERNELS(Half, float)
DCNZOO_INSTANTIATE_KERNELS(BFloat16, BFloat16)
DCNZOO_INSTANTIATE_KERNELS(BFloat16, float)

}  // namespace dcnzoo::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
