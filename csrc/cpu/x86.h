// Compiles the kernels in the header that DCNZOO_KERNELS names for x86-64 processors with AVX2, FMA and F16C, or, where
// DCNZOO_AVX512 is defined, with AVX-512 (F, BW, DQ, VL). What they include themselves comes before.
#ifdef DCNZOO_X86_64
#include <cmath>

#include <immintrin.h>

#ifdef DCNZOO_AVX512
#define DCNZOO_TARGET avx512
#define DCNZOO_SIMD "simd_avx512.h"
#else
#define DCNZOO_TARGET avx2
#define DCNZOO_SIMD "simd_avx2.h"
#endif

#if defined(__clang__)
#ifdef DCNZOO_AVX512
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#endif
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 sees some in its own intrinsics
#ifdef DCNZOO_AVX512
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#endif

namespace dcnzoo::cpu::DCNZOO_TARGET {
namespace {
#include "simd_generic.h"
// This first.
#include DCNZOO_SIMD

template <typename V>
using VectorFor = std::conditional_t<std::is_same_v<V, double>, GenericVector<double, FloatVector::kLanes / 2>, FloatVector>;
}  // namespace
#include DCNZOO_KERNELS
}  // namespace dcnzoo::cpu::DCNZOO_TARGET

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
