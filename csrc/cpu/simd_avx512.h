// Sixteen floats in an AVX-512 register, with what the kernels need of them. Included within a region compiled for AVX-512.
#pragma once

struct FloatVector {
  using Scalar = float;
  using Mask = __mmask16;
  static constexpr int64_t kLanes = 16;
  __m512 r;

  static DCNZOO_INLINE __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
  static DCNZOO_INLINE __m512 widen(__m256i v, Half) { return _mm512_cvtph_ps(v); }
  static DCNZOO_INLINE __m512 widen(__m256i v, BFloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static DCNZOO_INLINE __m256i narrow(__m512 v, Half) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static DCNZOO_INLINE __m256i narrow(__m512 v, BFloat16) {  // to the nearest, ties to even
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
  }

  static DCNZOO_INLINE FloatVector broadcast(float x) { return {_mm512_set1_ps(x)}; }
  // x, y, x, y, ...
  static DCNZOO_INLINE FloatVector broadcast_pair(float x, float y) {
    return {_mm512_unpacklo_ps(_mm512_set1_ps(x), _mm512_set1_ps(y))};
  }
  static DCNZOO_INLINE FloatVector load(const float* p) { return {_mm512_loadu_ps(p)}; }
  template <typename T>
  static DCNZOO_INLINE FloatVector load(const T* p) {
    return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T())};
  }
  // The first `count` lanes, at most kLanes; the others are 0 and their memory is not touched.
  static DCNZOO_INLINE FloatVector load_first(const float* p, int64_t count) {
    return {_mm512_maskz_loadu_ps(first(count), p)};
  }
  template <typename T>
  static DCNZOO_INLINE FloatVector load_first(const T* p, int64_t count) {
    return {widen(_mm256_maskz_loadu_epi16(first(count), p), T())};
  }
  // Even and odd elements of two vectors.
  static DCNZOO_INLINE void split_pairs(FloatVector low, FloatVector high, FloatVector& even, FloatVector& odd) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    even.r = _mm512_permutex2var_ps(low.r, evens, high.r);
    odd.r = _mm512_permutex2var_ps(low.r, odds, high.r);
  }
  // The inverse.
  static DCNZOO_INLINE void join_pairs(FloatVector even, FloatVector odd, FloatVector& low, FloatVector& high) {
    const __m512i lows = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i highs = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    low.r = _mm512_permutex2var_ps(even.r, lows, odd.r);
    high.r = _mm512_permutex2var_ps(even.r, highs, odd.r);
  }
  // Stores a[0], b[0], c[0], d[0], a[1], ...
  static DCNZOO_INLINE void store_interleaved(float* p, FloatVector a, FloatVector b, FloatVector c, FloatVector d) {
    FloatVector ac[2], bd[2], low, high;
    join_pairs(a, c, ac[0], ac[1]);
    join_pairs(b, d, bd[0], bd[1]);
    for (int64_t i = 0; i < 2; ++i) {
      join_pairs(ac[i], bd[i], low, high);
      low.store(p + 32 * i);
      high.store(p + 32 * i + 16);
    }
  }
  // Four numbers, each in all lanes.
  static DCNZOO_INLINE void load_four(const float* p, FloatVector (&numbers)[4]) {
    const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    numbers[0].r = _mm512_permute_ps(four, 0x00);
    numbers[1].r = _mm512_permute_ps(four, 0x55);
    numbers[2].r = _mm512_permute_ps(four, 0xaa);
    numbers[3].r = _mm512_permute_ps(four, 0xff);
  }
  // Stores the sums of the lanes of four vectors.
  static DCNZOO_INLINE void store_sums(float* p, FloatVector a, FloatVector b, FloatVector c, FloatVector d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.r, b.r), _mm512_unpackhi_ps(a.r, b.r));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.r, d.r), _mm512_unpackhi_ps(c.r, d.r));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }

  DCNZOO_INLINE float sum() const { return _mm512_reduce_add_ps(r); }
  // Of numbers that are not NaN.
  DCNZOO_INLINE float highest() const { return _mm512_reduce_max_ps(r); }
  DCNZOO_INLINE void store(float* p) const { _mm512_storeu_ps(p, r); }
  template <typename T>
  DCNZOO_INLINE void store(T* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(r, T()));
  }
  DCNZOO_INLINE void store_first(float* p, int64_t count) const { _mm512_mask_storeu_ps(p, first(count), r); }
  template <typename T>
  DCNZOO_INLINE void store_first(T* p, int64_t count) const {
    _mm256_mask_storeu_epi16(p, first(count), narrow(r, T()));
  }

  static DCNZOO_INLINE Mask both(Mask a, Mask b) { return _mm512_kand(a, b); }
  DCNZOO_INLINE bool any_nan() const { return _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q) != 0; }
};

DCNZOO_INLINE FloatVector operator+(FloatVector a, FloatVector b) { return {_mm512_add_ps(a.r, b.r)}; }
DCNZOO_INLINE FloatVector operator-(FloatVector a, FloatVector b) { return {_mm512_sub_ps(a.r, b.r)}; }
DCNZOO_INLINE FloatVector operator*(FloatVector a, FloatVector b) { return {_mm512_mul_ps(a.r, b.r)}; }
// a * b + c
DCNZOO_INLINE FloatVector fma(FloatVector a, FloatVector b, FloatVector c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
// b where a is NaN
DCNZOO_INLINE FloatVector min(FloatVector a, FloatVector b) { return {_mm512_min_ps(a.r, b.r)}; }
DCNZOO_INLINE FloatVector max(FloatVector a, FloatVector b) { return {_mm512_max_ps(a.r, b.r)}; }
DCNZOO_INLINE FloatVector truncate(FloatVector a) {
  return {_mm512_roundscale_ps(a.r, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)};
}
DCNZOO_INLINE FloatVector floor(FloatVector a) {
  return {_mm512_roundscale_ps(a.r, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
// a < b in each lane, false for NaN
DCNZOO_INLINE __mmask16 less(FloatVector a, FloatVector b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_LT_OQ); }
DCNZOO_INLINE FloatVector select(__mmask16 mask, FloatVector a, FloatVector b) {
  return {_mm512_mask_blend_ps(mask, b.r, a.r)};
}
// 2^n * a, for whole n
DCNZOO_INLINE FloatVector scale_by_power(FloatVector a, FloatVector n) { return {_mm512_scalef_ps(a.r, n.r)}; }
// a where x >= limit or x is NaN, else 0
DCNZOO_INLINE FloatVector zero_below(FloatVector a, FloatVector x, FloatVector limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.r, limit.r, _CMP_NLT_UQ), a.r)};
}
DCNZOO_INLINE FloatVector round(FloatVector a) {
  return {_mm512_roundscale_ps(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// x * x_step + y * y_step, for whole numbers x and y.
DCNZOO_INLINE void store_offsets(int32_t* p, FloatVector x, FloatVector y, int32_t x_step, int32_t y_step) {
  const __m512i columns = _mm512_mullo_epi32(_mm512_cvttps_epi32(x.r), _mm512_set1_epi32(x_step));
  const __m512i rows = _mm512_mullo_epi32(_mm512_cvttps_epi32(y.r), _mm512_set1_epi32(y_step));
  _mm512_storeu_si512(p, _mm512_add_epi32(columns, rows));
}
