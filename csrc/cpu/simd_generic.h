// A vector of any type and length in the language extension of GCC and Clang, which maps it to what the processor has:
// float64 everywhere, float32 where there are no intrinsics.
#pragma once

template <typename T, int64_t kCount>
struct LanesOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

template <typename T, int64_t kCount>
struct GenericVector {
  using Scalar = T;
  static constexpr int64_t kLanes = kCount;
  using Lanes = typename LanesOf<T, kCount>::type;
  using Ints = typename LanesOf<int32_t, kCount>::type;
  using Words = typename LanesOf<uint32_t, kCount>::type;
  using Halves = typename LanesOf<uint16_t, kCount>::type;
  using Mask = decltype(Lanes{} < Lanes{});
  Lanes r;

  static DCNZOO_INLINE GenericVector broadcast(T x) { return {Lanes{} + x}; }
  // x, y, x, y, ...
  static DCNZOO_INLINE GenericVector broadcast_pair(T x, T y) {
    Lanes lanes;
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[i] = i % 2 == 0 ? x : y;
    }
    return {lanes};
  }
  static DCNZOO_INLINE GenericVector load(const T* p) {
    Lanes lanes;
    __builtin_memcpy(&lanes, p, sizeof(lanes));
    return {lanes};
  }
  static DCNZOO_INLINE Words load_words(const void* p) {
    Halves halves;
    __builtin_memcpy(&halves, p, sizeof(halves));
    return __builtin_convertvector(halves, Words);
  }
  static DCNZOO_INLINE GenericVector load(const BFloat16* p) { return {(Lanes)(load_words(p) << 16)}; }
  static DCNZOO_INLINE GenericVector load(const Half* p) {
    const Words bits = load_words(p), magnitude = bits & 0x7fff;
    // Moved to float32's place the exponent is too small by 112, also for subnormal numbers; infinity and NaN keep
    // theirs, which is all ones.
    const Words finite = (Words)((Lanes)(magnitude << 13) * 0x1p112f);
    const Words other = (magnitude << 13) | 0x7f800000;
    return {(Lanes)(((Ints)magnitude >= 0x7c00 ? other : finite) | (bits & 0x8000) << 16)};
  }
  // The first `count` lanes, at most kLanes; the others are 0 and their memory is not touched.
  template <typename S>
  static DCNZOO_INLINE GenericVector load_first(const S* p, int64_t count) {
    S lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[i] = i < count ? p[i] : S(0);
    }
    return load(lanes);
  }
  // Even and odd elements of two vectors.
  static DCNZOO_INLINE void split_pairs(
      GenericVector low, GenericVector high, GenericVector& even, GenericVector& odd) {
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      even.r[i] = low.r[2 * i];
      odd.r[i] = low.r[2 * i + 1];
      even.r[i + kLanes / 2] = high.r[2 * i];
      odd.r[i + kLanes / 2] = high.r[2 * i + 1];
    }
  }
  // The inverse.
  static DCNZOO_INLINE void join_pairs(GenericVector even, GenericVector odd, GenericVector& low, GenericVector& high) {
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      low.r[2 * i] = even.r[i];
      low.r[2 * i + 1] = odd.r[i];
      high.r[2 * i] = even.r[i + kLanes / 2];
      high.r[2 * i + 1] = odd.r[i + kLanes / 2];
    }
  }
  // Stores a[0], b[0], c[0], d[0], a[1], ...
  static DCNZOO_INLINE void store_interleaved(
      T* p, GenericVector a, GenericVector b, GenericVector c, GenericVector d) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const typename LanesOf<T, 4>::type four{a.r[i], b.r[i], c.r[i], d.r[i]};
      __builtin_memcpy(p + 4 * i, &four, sizeof(four));
    }
  }
  // Four numbers, each in all lanes.
  static DCNZOO_INLINE void load_four(const T* p, GenericVector (&numbers)[4]) {
    typename LanesOf<T, 4>::type four;
    __builtin_memcpy(&four, p, sizeof(four));
    for (int64_t i = 0; i < 4; ++i) {
      numbers[i] = broadcast(four[i]);
    }
  }
  // Stores the sums of the lanes of four vectors.
  static DCNZOO_INLINE void store_sums(T* p, GenericVector a, GenericVector b, GenericVector c, GenericVector d) {
    typename LanesOf<T, 4>::type sums{};
    for (int64_t i = 0; i < kLanes; ++i) {
      sums += typename LanesOf<T, 4>::type{a.r[i], b.r[i], c.r[i], d.r[i]};
    }
    __builtin_memcpy(p, &sums, sizeof(sums));
  }

  DCNZOO_INLINE T sum() const {
    T sum = r[0];
    for (int64_t i = 1; i < kLanes; ++i) {
      sum += r[i];
    }
    return sum;
  }
  // Of numbers that are not NaN.
  DCNZOO_INLINE T highest() const {
    T highest = r[0];
    for (int64_t i = 1; i < kLanes; ++i) {
      highest = r[i] > highest ? r[i] : highest;
    }
    return highest;
  }
  DCNZOO_INLINE void store(T* p) const { __builtin_memcpy(p, &r, sizeof(r)); }
  template <typename S>
  DCNZOO_INLINE void store(S* p) const {
    store_first(p, kLanes);
  }
  template <typename S>
  DCNZOO_INLINE void store_first(S* p, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      p[i] = static_cast<S>(r[i]);
    }
  }

  DCNZOO_INLINE bool any_nan() const {
    const auto nan = r != r;
    bool any = false;
    for (int64_t i = 0; i < kLanes; ++i) {
      any |= nan[i] != 0;
    }
    return any;
  }

  friend DCNZOO_INLINE GenericVector operator+(GenericVector a, GenericVector b) { return {a.r + b.r}; }
  friend DCNZOO_INLINE GenericVector operator-(GenericVector a, GenericVector b) { return {a.r - b.r}; }
  friend DCNZOO_INLINE GenericVector operator*(GenericVector a, GenericVector b) { return {a.r * b.r}; }
  friend DCNZOO_INLINE GenericVector fma(GenericVector a, GenericVector b, GenericVector c) { return {a.r * b.r + c.r}; }
  // b where a is NaN
  friend DCNZOO_INLINE GenericVector min(GenericVector a, GenericVector b) { return {a.r < b.r ? a.r : b.r}; }
  friend DCNZOO_INLINE GenericVector max(GenericVector a, GenericVector b) { return {a.r > b.r ? a.r : b.r}; }
  // Of numbers that int32 can hold.
  friend DCNZOO_INLINE GenericVector truncate(GenericVector a) {
    return {__builtin_convertvector(__builtin_convertvector(a.r, Ints), Lanes)};
  }
  friend DCNZOO_INLINE GenericVector floor(GenericVector a) {  // the same
    const GenericVector whole = truncate(a);
    return {whole.r > a.r ? whole.r - 1 : whole.r};
  }
  // a < b in each lane, false for NaN
  friend DCNZOO_INLINE Mask less(GenericVector a, GenericVector b) { return a.r < b.r; }
  static DCNZOO_INLINE Mask both(Mask a, Mask b) { return a & b; }
  friend DCNZOO_INLINE GenericVector select(Mask mask, GenericVector a, GenericVector b) { return {mask ? a.r : b.r}; }
  // x * x_step + y * y_step, for whole numbers x and y.
  friend DCNZOO_INLINE void store_offsets(
      int32_t* p, GenericVector x, GenericVector y, int32_t x_step, int32_t y_step) {
    const Ints offsets = __builtin_convertvector(x.r, Ints) * x_step + __builtin_convertvector(y.r, Ints) * y_step;
    __builtin_memcpy(p, &offsets, sizeof(offsets));
  }
};

template <typename T, int64_t kCount>
DCNZOO_INLINE GenericVector<T, kCount> exp_of_negative(GenericVector<T, kCount> x) {
  for (int64_t i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, double>) {
      x.r[i] = ::exp(x.r[i]);
    } else {
      x.r[i] = ::expf(x.r[i]);
    }
  }
  return x;
}

// The lanes up to `count`, of any vector; the others are 0.
template <typename Vector, typename S>
DCNZOO_INLINE Vector load_up_to(const S* p, int64_t count) {
  return count >= Vector::kLanes ? Vector::load(p) : Vector::load_first(p, count);
}
template <typename Vector, typename S>
DCNZOO_INLINE void store_up_to(Vector vector, S* p, int64_t count) {
  if (count >= Vector::kLanes) {
    vector.store(p);
  } else {
    vector.store_first(p, count);
  }
}
