// DCNv4 over vectors of the including file's instruction set, which defines FloatVector.
//
// The points of a block of pixels and groups are laid out one after another, so that coordinates, weights and addresses
// are computed for a full vector of points at a time. Each point is then four weights and one address: its cell of four
// pixels is moved to lie inside the map and the weights are those of the moved cell, 0 for a pixel that is not the
// point's own. So the loads need no branch and touch no memory outside. The one thing this gets wrong is a weight of 0
// that meets a NaN or an infinity; the NaN shows in the sum, which is then done again by the plain kernel.

constexpr int64_t kBlockItems = 16;  // pixels times groups, about

// The arrays of a block's points.
template <typename T>
struct BlockPoints {
  T *positions;        // x, y
  T *masks;
  T *weights[4];       // mask times the weights of the cell's pixels, row by row
  int32_t *offsets;    // of the cell in bytes
};

template <typename Vector>
struct Grid {
  using T = typename Vector::Scalar;
  const T* positions;  // x, y of the kernel's points
  T scale, first_x, first_y, stride_x, stride_y;
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

// Softmax of one group's masks in place; may write to what follows them.
template <int64_t kPoints, typename Vector, typename T>
DCNZOO_INLINE void normalize_masks(T* masks, int64_t points) {
  const int64_t count = kPoints > 0 ? kPoints : points;
  T highest = masks[0];
  for (int64_t k = 1; k < count; ++k) {
    highest = masks[k] > highest ? masks[k] : highest;
  }
  for (int64_t i = 0; i < count; i += Vector::kLanes) {
    exp_of_negative(Vector::load(masks + i) - Vector::broadcast(highest)).store(masks + i);
  }
  T sum = 0;
  for (int64_t k = 0; k < count; ++k) {
    sum += masks[k];
  }
  for (int64_t i = 0; i < count; i += Vector::kLanes) {
    (Vector::load(masks + i) * Vector::broadcast(1 / sum)).store(masks + i);
  }
}

// Copies the positions and masks of one pixel and group to the place of its points in the block.
template <int64_t kPoints, typename Vector, typename O, typename T>
DCNZOO_INLINE void place_points(
    const O* packed, int64_t points, const T* grid, Vector scale, Vector origin, T* positions, T* masks) {
  constexpr int64_t lanes = Vector::kLanes;
  const int64_t count = kPoints > 0 ? kPoints : points;
  for (int64_t i = 0; i < 2 * count; i += lanes) {
    const Vector offsets =
        i + lanes <= 3 * count ? Vector::load(packed + i) : Vector::load_first(packed + i, 2 * count - i);
    (origin + (Vector::load(grid + i) + offsets) * scale).store(positions + i);
  }
  for (int64_t i = 0; i < count; i += lanes) {
    const O* source = packed + 2 * count + i;
    const Vector mask = i + lanes <= count ? Vector::load(source) : Vector::load_first(source, count - i);
    mask.store(masks + i);
  }
}

// Weights and addresses of `count` points.
template <typename Vector, typename T>
DCNZOO_INLINE void find_cells(
    const BlockPoints<T>& block, int64_t count, int64_t height, int64_t width, int32_t x_step, int32_t y_step) {
  const Vector zero = Vector::broadcast(0), one = Vector::broadcast(1);
  // In a map of one column the second pixel of a cell is the first again, and never counts.
  const Vector last_x = Vector::broadcast(static_cast<T>(width > 1 ? width - 2 : 0));
  const Vector last_y = Vector::broadcast(static_cast<T>(height > 1 ? height - 2 : 0));
  const Vector end_x = Vector::broadcast(static_cast<T>(width > 1 ? 2 : -1));
  const Vector end_y = Vector::broadcast(static_cast<T>(height > 1 ? 2 : -1));
  for (int64_t i = 0; i < count; i += Vector::kLanes) {
    Vector x, y;
    Vector::load_pairs(block.positions + 2 * i, x, y);
    const Vector mask = Vector::load(block.masks + i);
    const Vector cell_x = truncate(min(max(x, zero), last_x));
    const Vector cell_y = truncate(min(max(y, zero), last_y));
    const Vector u = x - cell_x, v = y - cell_y;
    const Vector left = max(min(one + u, one - u), zero), right = max(min(u, end_x - u), zero);
    const Vector top = mask * max(min(one + v, one - v), zero), bottom = mask * max(min(v, end_y - v), zero);
    (top * left).store(block.weights[0] + i);
    (top * right).store(block.weights[1] + i);
    (bottom * left).store(block.weights[2] + i);
    (bottom * right).store(block.weights[3] + i);
    store_offsets(block.offsets + i, cell_x, cell_y, x_step, y_step);
  }
}

// The weighted sum over one pixel and group's points of kVectors vectors of channels, of which the last may be partial.
template <int64_t kPoints, int64_t kVectors, bool kPartial, typename Vector, typename V, typename T>
DCNZOO_INLINE bool gather(
    const BlockPoints<T>& block, int64_t first, int64_t points, const V* value, int64_t right, int64_t below,
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
    const int64_t offset = block.offsets[first + k];
    for (int64_t corner = 0; corner < 4; ++corner) {
      const Vector weight = Vector::broadcast(block.weights[corner][first + k]);
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
    const BlockPoints<T>& block, int64_t first, int64_t points, const V* value, int64_t right, int64_t below,
    int64_t group_width, V* output) {
  constexpr int64_t lanes = Vector::kLanes;
  if constexpr (kWidth > 0 && kWidth % lanes == 0) {
    return gather<kPoints, kWidth / lanes, false, Vector>(block, first, points, value, right, below, kWidth, output);
  } else {
    bool nan = false;
    int64_t channel = 0;
    for (; channel + 2 * lanes <= group_width; channel += 2 * lanes) {
      nan |= gather<kPoints, 2, false, Vector>(
          block, first, points, value + channel, right, below, 2 * lanes, output + channel);
    }
    if (channel + lanes < group_width) {
      nan |= gather<kPoints, 2, true, Vector>(
          block, first, points, value + channel, right, below, group_width - channel, output + channel);
    } else if (channel < group_width) {
      nan |= gather<kPoints, 1, true, Vector>(
          block, first, points, value + channel, right, below, group_width - channel, output + channel);
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
  const int64_t capacity = block_pixels * groups * points + 2 * lanes;
  const int64_t grid_capacity = 2 * points + lanes;

  Workspace workspace(
      Workspace::bytes<T>(2 * capacity) + 5 * Workspace::bytes<T>(capacity) + Workspace::bytes<int32_t>(capacity) +
      Workspace::bytes<T>(grid_capacity));
  BlockPoints<T> block;
  block.positions = workspace.take<T>(2 * capacity);
  block.masks = workspace.take<T>(capacity);
  for (T*& weights : block.weights) {
    weights = workspace.take<T>(capacity);
  }
  block.offsets = workspace.take<int32_t>(capacity);
  T* grid = workspace.take<T>(grid_capacity);
  for (int64_t k = 0; k < points; ++k) {
    const GridPoint point = grid_point(k, geometry);
    grid[2 * k] = static_cast<T>(point.column * geometry.dilation_w);
    grid[2 * k + 1] = static_cast<T>(point.row * geometry.dilation_h);
  }
  const Vector scale = Vector::broadcast(static_cast<T>(geometry.offset_scale));

  const int64_t x_step = call.value.strides[2] * static_cast<int64_t>(sizeof(V));
  const int64_t y_step = call.value.strides[1] * static_cast<int64_t>(sizeof(V));
  const int64_t right = geometry.width > 1 ? x_step : 0, below = geometry.height > 1 ? y_step : 0;

  for (int64_t block_begin = begin; block_begin < end; block_begin += block_pixels) {
    const int64_t block_end = block_begin + block_pixels < end ? block_begin + block_pixels : end;
    int64_t column = block_begin % geometry.out_width;
    int64_t row = block_begin / geometry.out_width % geometry.out_height;
    int64_t n = block_begin / geometry.out_width / geometry.out_height;
    const int64_t first_column = column, first_row = row, first_n = n;
    int64_t placed = 0;
    const auto next_pixel = [&] {
      if (++column == geometry.out_width) {
        column = 0;
        if (++row == geometry.out_height) {
          row = 0;
          ++n;
        }
      }
    };
    for (int64_t pixel = block_begin; pixel < block_end; ++pixel, next_pixel()) {
      const Vector origin = Vector::broadcast_pair(
          grid_origin<T>(
              column, geometry.stride_w, geometry.pad_w, geometry.dilation_w, geometry.kernel_w, geometry.offset_scale),
          grid_origin<T>(
              row, geometry.stride_h, geometry.pad_h, geometry.dilation_h, geometry.kernel_h, geometry.offset_scale));
      const O* packed = call.offset_mask.at(n, row, column, 0);
      for (int64_t g = 0; g < groups; ++g, placed += points) {
        place_points<kPoints, Vector>(
            packed + 3 * points * g, points, grid, scale, origin, block.positions + 2 * placed, block.masks + placed);
        if (geometry.softmax) {
          normalize_masks<kPoints, Vector>(block.masks + placed, points);
        }
      }
    }
    find_cells<Vector>(
        block, placed, geometry.height, geometry.width, static_cast<int32_t>(x_step), static_cast<int32_t>(y_step));
    int64_t first = 0;
    column = first_column, row = first_row, n = first_n;
    for (int64_t pixel = block_begin; pixel < block_end; ++pixel, next_pixel()) {
      const V* image = call.value.data + n * call.value.strides[0];
      V* output = call.output + pixel * geometry.channels;
      for (int64_t g = 0; g < groups; ++g, first += points) {
        const bool nan = gather_group<kPoints, kWidth, Vector>(
            block, first, points, image + g * width, right, below, width, output + g * width);
        if (nan) {
          forward_point(call, n, row, column, g);
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
