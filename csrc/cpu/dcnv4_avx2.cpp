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
#include "dcnv4_kernels.h"

template <typename V>
using VectorFor = std::conditional_t<std::is_same_v<V, double>, GenericVector<double, 4>, FloatVector>;
}  // namespace

template <typename V, typename O>
void forward_pixels(const Forward<V, O>& call, int64_t begin, int64_t end) {
  forward<VectorFor<V>>(call, begin, end);
}

#define INSTANTIATE(V, O) template void forward_pixels(const Forward<V, O>&, int64_t, int64_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(Half, Half)
INSTANTIATE(Half, float)
INSTANTIATE(BFloat16, BFloat16)
INSTANTIATE(BFloat16, float)

}  // namespace dcnzoo::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
