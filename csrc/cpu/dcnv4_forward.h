// The forward pass. Each point becomes four weights and one address: its cell of four pixels is moved to lie inside the
// map and the weights are those of the moved cell, 0 for a pixel that is not the point's own. So the loads need no branch
// and touch no memory outside. The one thing this gets wrong is a weight of 0 that meets a NaN or an infinity; the NaN
// shows in the sum, which is then done again by the plain kernel.

template <typename T>
struct Cells {
  T* weights;        // mask times the weights of the cell's pixels, row by row, four a point
  int32_t* offsets;  // of the cell in bytes

  static int64_t bytes(int64_t capacity) { return Workspace::bytes<T>(4 * capacity) + Workspace::bytes<int32_t>(capacity); }
  Cells(Workspace& workspace, int64_t capacity) {
    weights = workspace.take<T>(4 * capacity);
    offsets = workspace.take<int32_t>(capacity);
  }
};

// Weights and addresses of `count` points.
template <typename Vector, typename T>
DCNZOO_INLINE void find_cells(
    const BlockPoints<T>& block, const Cells<T>& cells, int64_t count, int64_t height, int64_t width, int32_t x_step, int32_t y_step) {
  const Vector zero = Vector::broadcast(0), one = Vector::broadcast(1);
  // In a map of one column the second pixel of a cell is the first again, and never counts.
  const Vector last_x = Vector::broadcast(static_cast<T>(width > 1 ? width - 2 : 0));
  const Vector last_y = Vector::broadcast(static_cast<T>(height > 1 ? height - 2 : 0));
  const Vector end_x = Vector::broadcast(static_cast<T>(width > 1 ? 2 : -1));
  const Vector end_y = Vector::broadcast(static_cast<T>(height > 1 ? 2 : -1));
  for (int64_t i = 0; i < count; i += Vector::kLanes) {
    Vector x, y;
    load_positions<Vector>(block.positions + 2 * i, x, y);
    const Vector mask = Vector::load(block.masks + i);
    const Vector cell_x = truncate(min(max(x, zero), last_x));
    const Vector cell_y = truncate(min(max(y, zero), last_y));
    const Vector u = x - cell_x, v = y - cell_y;
    const Vector left = max(min(one + u, one - u), zero), right = max(min(u, end_x - u), zero);
    const Vector top = mask * max(min(one + v, one - v), zero), bottom = mask * max(min(v, end_y - v), zero);
    Vector::store_interleaved(cells.weights + 4 * i, top * left, top * right, bottom * left, bottom * right);
    store_offsets(cells.offsets + i, cell_x, cell_y, x_step, y_step);
  }
}

// The weighted sum over one pixel and group's points of kVectors vectors of channels, of which the last may be partial.
template <int64_t kPoints, int64_t kVectors, bool kPartial, typename Vector, typename V, typename T>
DCNZOO_INLINE bool gather(
    const Cells<T>& cells, int64_t first, int64_t points, const V* value, int64_t right, int64_t below,
    int64_t channels, V* output) {
  constexpr int64_t lanes = Vector::kLanes;
  constexpr int64_t chains = kVectors >= 4 ? 1 : kVectors == 2 ? 2 : 4;  // independent sums, against the latency
  const int64_t count = kPoints > 0 ? kPoints : points;
  const char* base = reinterpret_cast<const char*>(value);
  const char* corners[4] = {base, base + right, base + below, base + below + right};
  Vector sums[chains][kVectors];
  for (int64_t chain = 0; chain < chains; ++chain) {
    for (int64_t j = 0; j < kVectors; ++j) {
      sums[chain][j] = Vector::broadcast(0);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    const int64_t offset = cells.offsets[first + k];
    Vector weights[4];
    if constexpr (sizeof(V) < sizeof(T)) {
      // To widen the pixels keeps the shuffles busy enough.
      for (int64_t corner = 0; corner < 4; ++corner) {
        weights[corner] = Vector::broadcast(cells.weights[4 * (first + k) + corner]);
      }
    } else {
      Vector::load_four(cells.weights + 4 * (first + k), weights);
    }
    for (int64_t corner = 0; corner < 4; ++corner) {
      const Vector weight = weights[corner];
      const V* source = reinterpret_cast<const V*>(corners[corner] + offset);
      for (int64_t j = 0; j < kVectors; ++j) {
        const bool partial = kPartial && j == kVectors - 1;
        const Vector pixel =
            partial ? Vector::load_first(source + j * lanes, channels - j * lanes) : Vector::load(source + j * lanes);
        sums[corner % chains][j] = fma(weight, pixel, sums[corner % chains][j]);
      }
    }
  }
  bool nan = false;
  for (int64_t j = 0; j < kVectors; ++j) {
    Vector sum = sums[0][j];
    if constexpr (chains == 2) {
      sum = sum + sums[1][j];
    } else if constexpr (chains == 4) {
      sum = (sum + sums[1][j]) + (sums[2][j] + sums[3][j]);
    }
    nan |= sum.any_nan();
    if (kPartial && j == kVectors - 1) {
      sum.store_first(output + j * lanes, channels - j * lanes);
    } else {
      sum.store(output + j * lanes);
    }
  }
  return nan;
}

template <int64_t kPoints, int64_t kWidth, typename Vector, typename V, typename T>
DCNZOO_INLINE bool gather_group(
    const Cells<T>& cells, int64_t first, int64_t points, const V* value, int64_t right, int64_t below,
    int64_t group_width, V* output) {
  constexpr int64_t lanes = Vector::kLanes;
  if constexpr (kWidth > 0 && kWidth % lanes == 0) {
    return gather<kPoints, kWidth / lanes, false, Vector>(cells, first, points, value, right, below, kWidth, output);
  } else {
    bool nan = false;
    int64_t channel = 0;
    for (; channel + 2 * lanes <= group_width; channel += 2 * lanes) {
      nan |= gather<kPoints, 2, false, Vector>(
          cells, first, points, value + channel, right, below, 2 * lanes, output + channel);
    }
    if (channel + lanes < group_width) {
      nan |= gather<kPoints, 2, true, Vector>(
          cells, first, points, value + channel, right, below, group_width - channel, output + channel);
    } else if (channel < group_width) {
      nan |= gather<kPoints, 1, true, Vector>(
          cells, first, points, value + channel, right, below, group_width - channel, output + channel);
    }
    return nan;
  }
}

template <int64_t kPoints, int64_t kWidth, typename Vector, typename V, typename O>
void forward_range(const Forward<V, O>& call, int64_t begin, int64_t end) {
  using T = typename Vector::Scalar;
  constexpr int64_t lanes = Vector::kLanes;
  const Geometry& geometry = call.geometry;
  const int64_t points = kPoints > 0 ? kPoints : geometry.points;
  const int64_t groups = geometry.groups, width = kWidth > 0 ? kWidth : geometry.group_width;
  const int64_t block_pixels = groups < kBlockItems ? kBlockItems / groups : 1;
  const int64_t capacity = block_pixels * groups * points + lanes, grid_capacity = 2 * points + lanes;

  Workspace workspace(
      BlockPoints<T>::bytes(capacity) + Cells<T>::bytes(capacity) + Workspace::bytes<T>(grid_capacity));
  const BlockPoints<T> block(workspace, capacity);
  const Cells<T> cells(workspace, capacity);
  const T* grid = make_grid<T>(workspace, geometry, grid_capacity);
  const Vector scale = Vector::broadcast(static_cast<T>(geometry.offset_scale));
  const int64_t x_step = call.value.strides[2] * static_cast<int64_t>(sizeof(V));
  const int64_t y_step = call.value.strides[1] * static_cast<int64_t>(sizeof(V));
  const int64_t right = geometry.width > 1 ? x_step : 0, below = geometry.height > 1 ? y_step : 0;

  Pixel placed(geometry, begin), gathered = placed;
  for (int64_t block_begin = begin; block_begin < end; block_begin += block_pixels) {
    const int64_t block_end = block_begin + block_pixels < end ? block_begin + block_pixels : end;
    int64_t count = 0;
    for (int64_t i = block_begin; i < block_end; ++i, placed.advance(geometry)) {
      const Vector origin = placed.origin<Vector>(geometry);
      const O* packed = call.offset_mask.at(placed.n, placed.row, placed.column, 0);
      for (int64_t g = 0; g < groups; ++g, count += points) {
        place_points<kPoints, Vector>(
            packed + 3 * points * g, points, grid, scale, origin, geometry.softmax, block, count);
      }
    }
    find_cells<Vector>(
        block, cells, count, geometry.height, geometry.width, static_cast<int32_t>(x_step), static_cast<int32_t>(y_step));
    int64_t first = 0;
    for (int64_t i = block_begin; i < block_end; ++i, gathered.advance(geometry)) {
      const V* image = call.value.data + gathered.n * call.value.strides[0];
      V* output = call.output + i * geometry.channels;
      for (int64_t g = 0; g < groups; ++g, first += points) {
        const bool nan = gather_group<kPoints, kWidth, Vector>(
            cells, first, points, image + g * width, right, below, width, output + g * width);
        if (nan) {
          plain::forward_point(call, gathered.n, gathered.row, gathered.column, g);
        }
      }
    }
  }
}

template <typename Vector, typename V, typename O>
void forward(const Forward<V, O>& call, int64_t begin, int64_t end) {
  const int64_t points = call.geometry.points, width = call.geometry.group_width;
  if (points == 9 && width == 16) {
    forward_range<9, 16, Vector>(call, begin, end);
  } else if (points == 9 && width == 32) {
    forward_range<9, 32, Vector>(call, begin, end);
  } else {
    forward_range<0, 0, Vector>(call, begin, end);
  }
}
