// Multi-scale deformable attention in vectors. Each sample becomes four weights and one pixel: its cell of four pixels is
// moved to lie inside the map, and the weights are those of the moved cell, 0 for a pixel that is not the sample's own. So
// no pixel needs a branch and no memory outside is touched. The one thing this gets wrong is a weight of 0 that meets a NaN
// or an infinity: where one shows, the plain kernel does the query's head again. Included within a region compiled for one
// instruction set, where VectorFor<V> is the vector that values of a type are computed in.
#pragma once

namespace {

constexpr int64_t kBlockSamples = 128;  // of a block of queries, about

// Width and height of the level of each of a query's samples, head by head, as many times as a block has queries.
template <typename T>
struct LevelTable {
  T *widths, *heights;

  static int64_t bytes(int64_t capacity) { return 2 * Workspace::bytes<T>(capacity); }
  LevelTable(Workspace& workspace, const Attention& sizes, int64_t capacity)
      : widths(workspace.take<T>(capacity)), heights(workspace.take<T>(capacity)) {
    for (int64_t i = 0; i < capacity; ++i) {
      const Level& level = sizes.levels[i % sizes.samples() / sizes.points];
      widths[i] = static_cast<T>(level.width);
      heights[i] = static_cast<T>(level.height);
    }
  }
};

// One axis of a vector of samples: the first pixel of the moved cell, and the way from there.
template <typename Vector>
struct CellAxis {
  Vector cell, way, end;  // the second pixel counts up to `end`: in a map of one pixel it is the first again, and never

  // The weights of the cell's two pixels.
  DCNZOO_INLINE Vector low() const {
    const Vector one = Vector::broadcast(1);
    return max(min(one + way, one - way), Vector::broadcast(0));
  }
  DCNZOO_INLINE Vector high() const { return max(min(way, end - way), Vector::broadcast(0)); }
  // Their derivatives: that of the surface to the right of a sample which lies on a pixel.
  DCNZOO_INLINE Vector low_slope() const {
    const Vector zero = Vector::broadcast(0), one = Vector::broadcast(1), minus = Vector::broadcast(-1);
    return select(
        less(way, zero), select(less(minus, way), one, zero), select(less(way, one), minus, zero));
  }
  DCNZOO_INLINE Vector high_slope() const {
    const Vector zero = Vector::broadcast(0), one = Vector::broadcast(1), minus = Vector::broadcast(-1);
    const Vector falling = select(less(way, end), minus, zero);
    return select(less(way, zero), zero, select(less(way, min(one, end)), one, falling));
  }
};

template <typename Vector>
DCNZOO_INLINE CellAxis<Vector> find_cell(Vector location, Vector size) {
  const Vector zero = Vector::broadcast(0), two = Vector::broadcast(2);
  const Vector coordinate = location * size - Vector::broadcast(0.5f);
  const Vector cell = truncate(min(max(coordinate, zero), max(size - two, zero)));
  return {cell, coordinate - cell, select(less(size, two), Vector::broadcast(-1), two)};
}

// Locations of a vector of samples, of which there are `count` more.
template <typename Vector, typename O>
DCNZOO_INLINE void load_locations(const O* locations, int64_t count, Vector& x, Vector& y) {
  constexpr int64_t lanes = Vector::kLanes;
  const Vector first = load_up_to<Vector>(locations, 2 * count);
  const Vector second = 2 * count > lanes ? load_up_to<Vector>(locations + lanes, 2 * count - lanes) : Vector::broadcast(0);
  Vector::split_pairs(first, second, x, y);
}

// The samples of a block. Arrays have room for the vectors that are written over their ends.
template <typename T>
struct Cells {
  T* weights;       // attention weight times the weights of the cell's pixels, row by row, four a sample
  int32_t* pixels;  // the cell's first pixel, counted on its level

  static int64_t bytes(int64_t capacity) {
    return Workspace::bytes<T>(4 * capacity) + Workspace::bytes<int32_t>(capacity);
  }
  Cells(Workspace& workspace, int64_t capacity)
      : weights(workspace.take<T>(4 * capacity)), pixels(workspace.take<int32_t>(capacity)) {}
};

// Fills it with `count` samples; returns whether all attention weights are finite.
template <typename Vector, typename O, typename T>
DCNZOO_INLINE bool find_cells(
    const O* locations, const O* weights, int64_t count, const LevelTable<T>& table, const Cells<T>& cells) {
  const Vector zero = Vector::broadcast(0);
  Vector rest = zero;
  for (int64_t i = 0; i < count; i += Vector::kLanes) {
    Vector location_x, location_y;
    load_locations<Vector>(locations + 2 * i, count - i, location_x, location_y);
    const Vector weight = load_up_to<Vector>(weights + i, count - i), width = Vector::load(table.widths + i);
    const CellAxis<Vector> x = find_cell(location_x, width), y = find_cell(location_y, Vector::load(table.heights + i));
    const Vector left = x.low(), right = x.high(), top = weight * y.low(), bottom = weight * y.high();
    Vector::store_interleaved(cells.weights + 4 * i, top * left, top * right, bottom * left, bottom * right);
    store_offsets(cells.pixels + i, y.cell * width + x.cell, zero, 1, 0);
    rest = rest + (weight - weight);
  }
  return !rest.any_nan();
}

// Steps in pixels from a cell's first pixel to its four.
struct CellSteps {
  int64_t corner[4];

  explicit CellSteps(const Level& level)
      : corner{0, level.width > 1 ? 1 : 0, level.height > 1 ? level.width : 0,
               (level.height > 1 ? level.width : 0) + (level.width > 1 ? 1 : 0)} {}
};

// Calls f.template run<kVectors, kPartial>(channel, channels) for runs of a head's channels, of which the last vector may
// be partial; kDepth is their number where it is known.
template <int64_t kDepth, typename Vector, typename F>
DCNZOO_INLINE void for_each_run(int64_t depth, F&& f) {
  constexpr int64_t lanes = Vector::kLanes;
  if constexpr (kDepth > 0) {
    static_assert(kDepth % lanes == 0);
    f.template run<kDepth / lanes, false>(0, kDepth);
  } else {
    int64_t channel = 0;
    for (; channel + 2 * lanes <= depth; channel += 2 * lanes) {
      f.template run<2, false>(channel, 2 * lanes);
    }
    if (channel + lanes < depth) {
      f.template run<2, true>(channel, depth - channel);
    } else if (channel < depth) {
      f.template run<1, true>(channel, depth - channel);
    }
  }
}

// The vectors j of a run of channels at p.
template <bool kPartial, int64_t kVectors, typename Vector, typename S>
DCNZOO_INLINE Vector load_run(const S* p, int64_t j, int64_t channels) {
  constexpr int64_t lanes = Vector::kLanes;
  return kPartial && j == kVectors - 1 ? Vector::load_first(p + j * lanes, channels - j * lanes)
                                       : Vector::load(p + j * lanes);
}
template <bool kPartial, int64_t kVectors, typename Vector, typename S>
DCNZOO_INLINE void store_run(Vector vector, S* p, int64_t j, int64_t channels) {
  constexpr int64_t lanes = Vector::kLanes;
  if (kPartial && j == kVectors - 1) {
    vector.store_first(p + j * lanes, channels - j * lanes);
  } else {
    vector.store(p + j * lanes);
  }
}

// The weighted sum over the samples of one query and head.
template <typename Vector, typename V, typename T>
struct Gather {
  const Attention& sizes;
  const Cells<T>& cells;
  int64_t first;      // sample of the block
  const V* value;     // the head's first pixel
  int64_t step;       // from pixel to pixel
  V* output;
  bool nan = false;

  template <int64_t kVectors, bool kPartial>
  DCNZOO_INLINE void run(int64_t channel, int64_t channels) {
    constexpr int64_t chains = kVectors >= 4 ? 1 : kVectors == 2 ? 2 : 4;  // independent sums, against the latency
    Vector sums[chains][kVectors];
    for (int64_t chain = 0; chain < chains; ++chain) {
      for (int64_t j = 0; j < kVectors; ++j) {
        sums[chain][j] = Vector::broadcast(0);
      }
    }
    int64_t k = first;
    for (const Level& level : sizes.levels) {
      const CellSteps steps(level);
      const V* corners[4];
      for (int64_t c = 0; c < 4; ++c) {
        corners[c] = value + (level.start + steps.corner[c]) * step + channel;
      }
      for (const int64_t end = k + sizes.points; k < end; ++k) {
        const int64_t offset = cells.pixels[k] * step;
        Vector weights[4];
        Vector::load_four(cells.weights + 4 * k, weights);
        for (int64_t c = 0; c < 4; ++c) {
          for (int64_t j = 0; j < kVectors; ++j) {
            const Vector pixel = load_run<kPartial, kVectors, Vector>(corners[c] + offset, j, channels);
            sums[c % chains][j] = fma(weights[c], pixel, sums[c % chains][j]);
          }
        }
      }
    }
    for (int64_t j = 0; j < kVectors; ++j) {
      Vector sum = sums[0][j];
      if constexpr (chains == 2) {
        sum = sum + sums[1][j];
      } else if constexpr (chains == 4) {
        sum = (sum + sums[1][j]) + (sums[2][j] + sums[3][j]);
      }
      nan |= sum.any_nan();
      store_run<kPartial, kVectors>(sum, output + channel, j, channels);
    }
  }
};

template <int64_t kDepth, typename Vector, typename V, typename O>
void attend_range(const AttentionForward<V, O>& call, int64_t begin, int64_t end) {
  using T = typename Vector::Scalar;
  const Attention& sizes = call.sizes;
  const int64_t samples = sizes.samples(), per_query = sizes.heads * samples;
  const int64_t block = per_query < kBlockSamples ? kBlockSamples / per_query : 1;
  const int64_t capacity = block * per_query + Vector::kLanes;
  Workspace workspace(LevelTable<T>::bytes(capacity) + Cells<T>::bytes(capacity));
  const LevelTable<T> table(workspace, sizes, capacity);
  const Cells<T> cells(workspace, capacity);
  for (int64_t block_begin = begin; block_begin < end; block_begin += block) {
    const int64_t block_end = block_begin + block < end ? block_begin + block : end;
    find_cells<Vector>(
        call.locations + 2 * block_begin * per_query, call.weights + block_begin * per_query,
        (block_end - block_begin) * per_query, table, cells);
    int64_t first = 0;
    for (int64_t q = block_begin; q < block_end; ++q) {
      for (int64_t m = 0; m < sizes.heads; ++m, first += samples) {
        Gather<Vector, V, T> gather{
            sizes, cells, first, call.value.at(q / sizes.queries, 0, m, 0), call.value.strides[1],
            call.output + (q * sizes.heads + m) * sizes.depth};
        for_each_run<kDepth, Vector>(sizes.depth, gather);
        if (gather.nan) {
          plain::attend_one(call, q, m);
        }
      }
    }
  }
}

// Adds the shares of one query and head to the gradient of the value map; under kBands only pixels in
// [first_pixel, last_pixel) get theirs. Under kDots it multiplies the output's gradient with the values of the samples'
// pixels, too: four dots a sample.
template <bool kDots, bool kBands, typename Vector, typename V, typename T>
struct Scatter {
  const Attention& sizes;
  const Cells<T>& cells;
  const V* value;      // the head's first pixel
  int64_t value_step;  // from pixel to pixel
  T* sums;             // the same of the gradient
  int64_t sum_step;
  const V* grad;
  T* dots;
  int64_t first_pixel, last_pixel;

  template <int64_t kVectors, bool kPartial>
  DCNZOO_INLINE void run(int64_t channel, int64_t channels) {
    Vector grads[kVectors];
    for (int64_t j = 0; j < kVectors; ++j) {
      grads[j] = load_run<kPartial, kVectors, Vector>(grad + channel, j, channels);
    }
    int64_t k = 0;
    for (const Level& level : sizes.levels) {
      const CellSteps steps(level);
      for (const int64_t end = k + sizes.points; k < end; ++k) {
        Vector weights[4], dot[4];
        Vector::load_four(cells.weights + 4 * k, weights);
        for (int64_t c = 0; c < 4; ++c) {
          const int64_t pixel = level.start + cells.pixels[k] + steps.corner[c];
          dot[c] = Vector::broadcast(0);
          if constexpr (kDots) {
            for (int64_t j = 0; j < kVectors; ++j) {
              const V* source = value + pixel * value_step + channel;
              dot[c] = fma(grads[j], load_run<kPartial, kVectors, Vector>(source, j, channels), dot[c]);
            }
          }
          if (!kBands || (pixel >= first_pixel && pixel < last_pixel)) {
            T* target = sums + pixel * sum_step + channel;
            for (int64_t j = 0; j < kVectors; ++j) {
              const Vector sum = load_run<kPartial, kVectors, Vector>(target, j, channels);
              store_run<kPartial, kVectors>(fma(weights[c], grads[j], sum), target, j, channels);
            }
          }
        }
        if constexpr (kDots) {
          T sum[4];
          Vector::store_sums(sum, dot[0], dot[1], dot[2], dot[3]);
          for (int64_t c = 0; c < 4; ++c) {
            dots[4 * k + c] = channel == 0 ? sum[c] : dots[4 * k + c] + sum[c];
          }
        }
      }
    }
  }
};

// Turns the dots of one query and head into the gradients of its locations and weights; returns whether one is NaN.
template <typename Vector, typename O, typename T>
DCNZOO_INLINE bool find_gradients(
    const O* locations, const O* weights, int64_t count, const LevelTable<T>& table, const T* dots, O* grad_locations,
    O* grad_weights) {
  constexpr int64_t lanes = Vector::kLanes;
  Vector check = Vector::broadcast(0);
  for (int64_t i = 0; i < count; i += lanes) {
    const int64_t rest = count - i;
    Vector location_x, location_y;
    load_locations<Vector>(locations + 2 * i, rest, location_x, location_y);
    const Vector weight = load_up_to<Vector>(weights + i, rest);
    const Vector width = Vector::load(table.widths + i), height = Vector::load(table.heights + i);
    const CellAxis<Vector> x = find_cell(location_x, width), y = find_cell(location_y, height);
    Vector even[2], odd[2], dot[4];
    for (int64_t half = 0; half < 2; ++half) {
      const T* pairs = dots + 4 * i + 2 * lanes * half;
      Vector::split_pairs(Vector::load(pairs), Vector::load(pairs + lanes), even[half], odd[half]);
    }
    Vector::split_pairs(even[0], even[1], dot[0], dot[2]);
    Vector::split_pairs(odd[0], odd[1], dot[1], dot[3]);

    const Vector left = x.low(), right = x.high(), top = y.low(), bottom = y.high();
    const Vector on_left = top * dot[0] + bottom * dot[2], on_right = top * dot[1] + bottom * dot[3];
    const Vector above = left * dot[0] + right * dot[1], below = left * dot[2] + right * dot[3];
    const Vector grad_x = weight * width * (x.low_slope() * on_left + x.high_slope() * on_right);
    const Vector grad_y = weight * height * (y.low_slope() * above + y.high_slope() * below);
    const Vector grad_weight = left * on_left + right * on_right;
    Vector first, second;
    Vector::join_pairs(grad_x, grad_y, first, second);
    if (rest >= lanes) {
      first.store(grad_locations + 2 * i);
      second.store(grad_locations + 2 * i + lanes);
      grad_weight.store(grad_weights + i);
    } else {
      first.store_first(grad_locations + 2 * i, 2 * rest < lanes ? 2 * rest : lanes);
      second.store_first(grad_locations + 2 * i + lanes, 2 * rest > lanes ? 2 * rest - lanes : 0);
      grad_weight.store_first(grad_weights + i, rest);
    }
    check = check + (grad_x + grad_y + grad_weight);
  }
  return check.any_nan();
}

template <typename Vector, typename S>
DCNZOO_INLINE bool is_finite(const S* p, int64_t count) {
  Vector rest = Vector::broadcast(0);
  for (int64_t i = 0; i < count; i += Vector::kLanes) {
    const Vector numbers = load_up_to<Vector>(p + i, count - i);
    rest = rest + (numbers - numbers);
  }
  return !rest.any_nan();
}

template <int64_t kDepth, bool kBands, typename Vector, typename V, typename O>
void attend_backward_range(const AttentionBackward<V, O>& call, int64_t bands, int64_t begin, int64_t end) {
  using T = typename Vector::Scalar;
  const Attention& sizes = call.sizes;
  const int64_t samples = sizes.samples(), capacity = samples + Vector::kLanes;
  Workspace workspace(LevelTable<T>::bytes(capacity) + Cells<T>::bytes(capacity) + Workspace::bytes<T>(4 * capacity));
  const LevelTable<T> table(workspace, sizes, capacity);
  const Cells<T> cells(workspace, capacity);
  T* dots = workspace.take<T>(4 * capacity);
  const int64_t value_step = call.value.strides[1], sum_step = sizes.heads * sizes.depth;

  for (int64_t index = begin; index < end; ++index) {
    const AttentionUnit unit(sizes, bands, index);
    const V* value = call.value.at(unit.n, 0, unit.m, 0);
    T* sums = call.grad_value + (unit.n * sizes.pixels * sizes.heads + unit.m) * sizes.depth;
    for (int64_t i = 0; i < sizes.queries; ++i) {
      const int64_t q = unit.n * sizes.queries + i, item = q * sizes.heads + unit.m;
      const O* locations = call.locations + 2 * item * samples;
      const O* weights = call.weights + item * samples;
      const V* grad = call.grad_output + item * sizes.depth;
      const bool own = !kBands || (i >= unit.first_query && i < unit.last_query);
      const bool finite_weights = find_cells<Vector>(locations, weights, samples, table, cells);
      if (!finite_weights || !is_finite<Vector>(grad, sizes.depth)) {
        plain::scatter_one(call, q, unit.m, unit.first_pixel, unit.last_pixel);
        if (own) {
          plain::find_gradients_of_one(call, q, unit.m);
        }
        continue;
      }
      if (own) {
        Scatter<true, kBands, Vector, V, T> scatter{
            sizes, cells, value, value_step, sums, sum_step, grad, dots, unit.first_pixel, unit.last_pixel};
        for_each_run<kDepth, Vector>(sizes.depth, scatter);
        const bool nan = find_gradients<Vector>(
            locations, weights, samples, table, dots, call.grad_locations + 2 * item * samples,
            call.grad_weights + item * samples);
        if (nan) {
          plain::find_gradients_of_one(call, q, unit.m);
        }
      } else {
        Scatter<false, kBands, Vector, V, T> scatter{
            sizes, cells, value, value_step, sums, sum_step, grad, dots, unit.first_pixel, unit.last_pixel};
        for_each_run<kDepth, Vector>(sizes.depth, scatter);
      }
    }
  }
}

template <typename Vector, typename V, typename O>
void attend_by_depth(const AttentionForward<V, O>& call, int64_t begin, int64_t end) {
  if (call.sizes.depth == 32) {
    attend_range<32, Vector>(call, begin, end);
  } else {
    attend_range<0, Vector>(call, begin, end);
  }
}

template <typename Vector, typename V, typename O>
void attend_backward_by_depth(const AttentionBackward<V, O>& call, int64_t bands, int64_t begin, int64_t end) {
  const bool whole = bands == 1;
  if (call.sizes.depth == 32) {
    const auto kernel = whole ? attend_backward_range<32, false, Vector, V, O> : attend_backward_range<32, true, Vector, V, O>;
    kernel(call, bands, begin, end);
  } else {
    const auto kernel = whole ? attend_backward_range<0, false, Vector, V, O> : attend_backward_range<0, true, Vector, V, O>;
    kernel(call, bands, begin, end);
  }
}

}  // namespace

template <typename V, typename O>
void attend(const AttentionForward<V, O>& call, int64_t begin, int64_t end) {
  attend_by_depth<VectorFor<V>>(call, begin, end);
}

template <typename V, typename O>
void attend_backward(const AttentionBackward<V, O>& call, int64_t bands, int64_t begin, int64_t end) {
  attend_backward_by_depth<VectorFor<V>>(call, bands, begin, end);
}

DCNZOO_FOR_ALL_TYPES(DCNZOO_INSTANTIATE_ATTENTION)
