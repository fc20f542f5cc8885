// Eight floats in an AVX register, with what the kernels need of them. Included within a region compiled for AVX2.
#pragma once

struct FloatVector {
  using Scalar = float;
  using Mask = __m256;
  static constexpr int64_t kLanes = 8;
  __m256 r;

  static DCNZOO_INLINE __m256i first(int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  }
  static DCNZOO_INLINE __m256 widen(__m128i v, Half) { return _mm256_cvtph_ps(v); }
  static DCNZOO_INLINE __m256 widen(__m128i v, BFloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static DCNZOO_INLINE __m128i narrow(__m256 v, Half) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static DCNZOO_INLINE __m128i narrow(__m256 v, BFloat16) {  // to the nearest, ties to even
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }

  static DCNZOO_INLINE FloatVector broadcast(float x) { return {_mm256_set1_ps(x)}; }
  // x, y, x, y, ...
  static DCNZOO_INLINE FloatVector broadcast_pair(float x, float y) {
    return {_mm256_unpacklo_ps(_mm256_set1_ps(x), _mm256_set1_ps(y))};
  }
  static DCNZOO_INLINE FloatVector load(const float* p) { return {_mm256_loadu_ps(p)}; }
  template <typename T>
  static DCNZOO_INLINE FloatVector load(const T* p) {
    return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T())};
  }
  // The first `count` lanes, at most kLanes; the others are 0 and their memory is not touched.
  static DCNZOO_INLINE FloatVector load_first(const float* p, int64_t count) {
    return {_mm256_maskload_ps(p, first(count))};
  }
  template <typename T>
  static DCNZOO_INLINE FloatVector load_first(const T* p, int64_t count) {
    T lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[i].x = i < count ? p[i].x : 0;
    }
    return load(lanes);
  }
  // Even and odd elements of two vectors.
  static DCNZOO_INLINE void split_pairs(FloatVector low, FloatVector high, FloatVector& even, FloatVector& odd) {
    const __m256 outer = _mm256_permute2f128_ps(low.r, high.r, 0x20);
    const __m256 inner = _mm256_permute2f128_ps(low.r, high.r, 0x31);
    even.r = _mm256_shuffle_ps(outer, inner, 0x88);
    odd.r = _mm256_shuffle_ps(outer, inner, 0xdd);
  }
  // The inverse.
  static DCNZOO_INLINE void join_pairs(FloatVector even, FloatVector odd, FloatVector& low, FloatVector& high) {
    const __m256 outer = _mm256_unpacklo_ps(even.r, odd.r), inner = _mm256_unpackhi_ps(even.r, odd.r);
    low.r = _mm256_permute2f128_ps(outer, inner, 0x20);
    high.r = _mm256_permute2f128_ps(outer, inner, 0x31);
  }
  // Stores a[0], b[0], c[0], d[0], a[1], ...
  static DCNZOO_INLINE void store_interleaved(float* p, FloatVector a, FloatVector b, FloatVector c, FloatVector d) {
    FloatVector ac[2], bd[2], low, high;
    join_pairs(a, c, ac[0], ac[1]);
    join_pairs(b, d, bd[0], bd[1]);
    for (int64_t i = 0; i < 2; ++i) {
      join_pairs(ac[i], bd[i], low, high);
      low.store(p + 16 * i);
      high.store(p + 16 * i + 8);
    }
  }
  // Four numbers, each in all lanes.
  static DCNZOO_INLINE void load_four(const float* p, FloatVector (&numbers)[4]) {
    const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    numbers[0].r = _mm256_permute_ps(four, 0x00);
    numbers[1].r = _mm256_permute_ps(four, 0x55);
    numbers[2].r = _mm256_permute_ps(four, 0xaa);
    numbers[3].r = _mm256_permute_ps(four, 0xff);
  }
  // Stores the sums of the lanes of four vectors.
  static DCNZOO_INLINE void store_sums(float* p, FloatVector a, FloatVector b, FloatVector c, FloatVector d) {
    const __m256 ab = _mm256_hadd_ps(a.r, b.r), cd = _mm256_hadd_ps(c.r, d.r), abcd = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }

  DCNZOO_INLINE float sum() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // Of numbers that are not NaN.
  DCNZOO_INLINE float highest() const {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  DCNZOO_INLINE void store(float* p) const { _mm256_storeu_ps(p, r); }
  template <typename T>
  DCNZOO_INLINE void store(T* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(r, T()));
  }
  DCNZOO_INLINE void store_first(float* p, int64_t count) const { _mm256_maskstore_ps(p, first(count), r); }
  template <typename T>
  DCNZOO_INLINE void store_first(T* p, int64_t count) const {
    T lanes[kLanes];
    store(lanes);
    for (int64_t i = 0; i < count && i < kLanes; ++i) {
      p[i] = lanes[i];
    }
  }

  static DCNZOO_INLINE Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  DCNZOO_INLINE bool any_nan() const { return _mm256_movemask_ps(_mm256_cmp_ps(r, r, _CMP_UNORD_Q)) != 0; }
};

DCNZOO_INLINE FloatVector operator+(FloatVector a, FloatVector b) { return {_mm256_add_ps(a.r, b.r)}; }
DCNZOO_INLINE FloatVector operator-(FloatVector a, FloatVector b) { return {_mm256_sub_ps(a.r, b.r)}; }
DCNZOO_INLINE FloatVector operator*(FloatVector a, FloatVector b) { return {_mm256_mul_ps(a.r, b.r)}; }
// a * b + c
DCNZOO_INLINE FloatVector fma(FloatVector a, FloatVector b, FloatVector c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }
// b where a is NaN
DCNZOO_INLINE FloatVector min(FloatVector a, FloatVector b) { return {_mm256_min_ps(a.r, b.r)}; }
DCNZOO_INLINE FloatVector max(FloatVector a, FloatVector b) { return {_mm256_max_ps(a.r, b.r)}; }
DCNZOO_INLINE FloatVector truncate(FloatVector a) {
  return {_mm256_round_ps(a.r, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)};
}
DCNZOO_INLINE FloatVector floor(FloatVector a) { return {_mm256_floor_ps(a.r)}; }
// a < b in each lane, false for NaN
DCNZOO_INLINE __m256 less(FloatVector a, FloatVector b) { return _mm256_cmp_ps(a.r, b.r, _CMP_LT_OQ); }
DCNZOO_INLINE FloatVector select(__m256 mask, FloatVector a, FloatVector b) {
  return {_mm256_blendv_ps(b.r, a.r, mask)};
}
DCNZOO_INLINE FloatVector round(FloatVector a) {
  return {_mm256_round_ps(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n * a, for whole n from -126 to 127
DCNZOO_INLINE FloatVector scale_by_power(FloatVector a, FloatVector n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.r), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.r, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
// a where x >= limit or x is NaN, else 0
DCNZOO_INLINE FloatVector zero_below(FloatVector a, FloatVector x, FloatVector limit) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.r, limit.r, _CMP_NLT_UQ), a.r)};
}
// x * x_step + y * y_step, for whole numbers x and y.
DCNZOO_INLINE void store_offsets(int32_t* p, FloatVector x, FloatVector y, int32_t x_step, int32_t y_step) {
  const __m256i columns = _mm256_mullo_epi32(_mm256_cvttps_epi32(x.r), _mm256_set1_epi32(x_step));
  const __m256i rows = _mm256_mullo_epi32(_mm256_cvttps_epi32(y.r), _mm256_set1_epi32(y_step));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_add_epi32(columns, rows));
}
