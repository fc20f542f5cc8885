// The sampling points of a block of output pixels and groups, laid out one after another, so that what follows is computed
// for a full vector of points at a time.

constexpr int64_t kBlockItems = 16;  // pixels times groups, about

template <typename T>
struct BlockPoints {
  T* positions;  // x, y
  T* masks;      // after the softmax, where there is one

  // Both arrays with room for the vectors that are written over their ends.
  static int64_t bytes(int64_t capacity) { return Workspace::bytes<T>(2 * capacity) + Workspace::bytes<T>(capacity); }
  BlockPoints(Workspace& workspace, int64_t capacity)
      : positions(workspace.take<T>(2 * capacity)), masks(workspace.take<T>(capacity)) {}
};

// The kernel's points before offsets: x, y of each.
template <typename T>
T* make_grid(Workspace& workspace, const Geometry& geometry, int64_t capacity) {
  T* grid = workspace.take<T>(capacity);
  for (int64_t k = 0; k < geometry.points; ++k) {
    const GridPoint point = grid_point(k, geometry);
    grid[2 * k] = static_cast<T>(point.column * geometry.dilation_w);
    grid[2 * k + 1] = static_cast<T>(point.row * geometry.dilation_h);
  }
  return grid;
}

// An output pixel, counted over the batch row by row.
struct Pixel {
  int64_t n, row, column;

  Pixel(const Geometry& geometry, int64_t index)
      : n(index / geometry.out_width / geometry.out_height),
        row(index / geometry.out_width % geometry.out_height),
        column(index % geometry.out_width) {}

  DCNZOO_INLINE void advance(const Geometry& geometry) {
    if (++column == geometry.out_width) {
      column = 0;
      if (++row == geometry.out_height) {
        row = 0;
        ++n;
      }
    }
  }
  template <typename Vector>
  DCNZOO_INLINE Vector origin(const Geometry& geometry) const {
    using T = typename Vector::Scalar;
    return Vector::broadcast_pair(
        grid_origin<T>(
            column, geometry.stride_w, geometry.pad_w, geometry.dilation_w, geometry.kernel_w, geometry.offset_scale),
        grid_origin<T>(
            row, geometry.stride_h, geometry.pad_h, geometry.dilation_h, geometry.kernel_h, geometry.offset_scale));
  }
};

// e^x to a rounding error or two, for x <= 0; what is below float32's normal numbers becomes 0.
template <typename Vector>
DCNZOO_INLINE Vector exp_of_negative(Vector x) {
  const Vector power = round(x * Vector::broadcast(1.44269504f));
  const Vector rest = fma(power, Vector::broadcast(2.12194440e-4f), fma(power, Vector::broadcast(-0.693359375f), x));
  Vector sum = Vector::broadcast(1.9875691500e-4f);  // Cephes' expf
  for (const float coefficient :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    sum = fma(sum, rest, Vector::broadcast(coefficient));
  }
  sum = fma(sum * rest, rest, rest + Vector::broadcast(1));
  return zero_below(scale_by_power(sum, power), x, Vector::broadcast(-87.3f));
}

// Zeros, then minus infinity, as many of each.
template <typename T, int64_t kCount>
struct NegativeTail {
  T numbers[2 * kCount]{};

  constexpr NegativeTail() {
    for (int64_t i = kCount; i < 2 * kCount; ++i) {
      numbers[i] = -std::numeric_limits<T>::infinity();
    }
  }
};

// Puts one pixel and group's masks at `masks`, after a softmax where asked for; may write to what follows them.
template <int64_t kPoints, typename Vector, typename O, typename T>
DCNZOO_INLINE void place_masks(const O* packed, int64_t points, bool softmax, T* masks) {
  constexpr int64_t lanes = Vector::kLanes;
  const int64_t count = kPoints > 0 ? kPoints : points;
  if (!softmax) {
    for (int64_t i = 0; i < count; i += lanes) {
      load_up_to<Vector>(packed + i, count - i).store(masks + i);
    }
    return;
  }
  // Added to logits it turns the zeros behind the last into minus infinity, whose share is 0.
  const auto behind = [](int64_t rest) {
    alignas(64) static constexpr NegativeTail<T, lanes> tail;
    return Vector::load(tail.numbers + lanes - (rest < lanes ? rest : lanes));
  };
  Vector highest = Vector::broadcast(-std::numeric_limits<T>::infinity());
  for (int64_t i = 0; i < count; i += lanes) {
    const Vector logits = load_up_to<Vector>(packed + i, count - i) + behind(count - i);
    highest = max(logits, highest);
    logits.store(masks + i);
  }
  highest = Vector::broadcast(highest.highest());
  Vector sums = Vector::broadcast(0);
  for (int64_t i = 0; i < count; i += lanes) {
    const Vector shares = exp_of_negative(Vector::load(masks + i) - highest);
    sums = sums + shares;
    shares.store(masks + i);
  }
  const Vector factor = Vector::broadcast(1 / sums.sum());
  for (int64_t i = 0; i < count; i += lanes) {
    (Vector::load(masks + i) * factor).store(masks + i);
  }
}

// Finds the positions and masks of one pixel and group, whose numbers in offset_mask begin at `packed`, and puts them at
// the block's place `first`. Places are filled in ascending order.
template <int64_t kPoints, typename Vector, typename O, typename T>
DCNZOO_INLINE void place_points(
    const O* packed, int64_t points, const T* grid, Vector scale, Vector origin, bool softmax,
    const BlockPoints<T>& block, int64_t first) {
  constexpr int64_t lanes = Vector::kLanes;
  const int64_t count = kPoints > 0 ? kPoints : points;
  T* positions = block.positions + 2 * first;
  for (int64_t i = 0; i < 2 * count; i += lanes) {
    const Vector offsets =
        i + lanes <= 3 * count ? Vector::load(packed + i) : Vector::load_first(packed + i, 2 * count - i);
    (origin + (Vector::load(grid + i) + offsets) * scale).store(positions + i);
  }
  place_masks<kPoints, Vector>(packed + 2 * count, count, softmax, block.masks + first);
}

template <typename Vector, typename T>
DCNZOO_INLINE void load_positions(const T* positions, Vector& x, Vector& y) {
  Vector::split_pairs(Vector::load(positions), Vector::load(positions + Vector::kLanes), x, y);
}
