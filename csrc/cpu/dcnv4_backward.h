// The backward pass of one image and group at a time: the group's channels of the value map are copied, widened, into a map
// with a border of zeros, and the gradient is added up in a second one of the same layout. A corner outside the map then
// reads zeros, and what is added there is dropped; points outside altogether share a cell that lies in the border. The
// dots of the gradient with the four corners give the gradients of offsets and mask as scalar combinations.

template <typename T>
struct BackwardPoints {
  T *weights;             // four a point, as in the forward pass
  T *fractions_x, *fractions_y;
  T *inside, *masks;      // 1 or 0; the mask, 0 outside
  T *dots;                // of the gradient with the cell's pixels, four a point
  T *position_grads, *mask_grads;
  int32_t *offsets;       // of the cell in bytes, from the map's first pixel inside the border

  static int64_t bytes(int64_t capacity) {
    return 5 * Workspace::bytes<T>(capacity) + 2 * Workspace::bytes<T>(4 * capacity) + Workspace::bytes<T>(2 * capacity) +
           Workspace::bytes<int32_t>(capacity);
  }
  BackwardPoints(Workspace& workspace, int64_t capacity) {
    for (T** array : {&fractions_x, &fractions_y, &inside, &masks, &mask_grads}) {
      *array = workspace.take<T>(capacity);
    }
    weights = workspace.take<T>(4 * capacity);
    dots = workspace.take<T>(4 * capacity);
    position_grads = workspace.take<T>(2 * capacity);
    offsets = workspace.take<int32_t>(capacity);
  }
};

// A map of one group's channels with a border. Below it is one more row of border, for the cell of the points outside.
template <typename T>
struct BorderedMap {
  T* data;
  int64_t row, pixel;  // strides in elements

  static int64_t size(const Geometry& geometry, int64_t pixel) {
    return (geometry.height + 3) * (geometry.width + 2) * pixel;
  }
  T* at(int64_t y, int64_t x) const { return data + (y + 1) * row + (x + 1) * pixel; }
};

template <typename Vector, typename T>
DCNZOO_INLINE void find_bordered_cells(
    const BlockPoints<T>& block, const BackwardPoints<T>& points, int64_t count, const Geometry& geometry,
    int32_t x_step, int32_t y_step) {
  const Vector zero = Vector::broadcast(0), one = Vector::broadcast(1), before = Vector::broadcast(-1);
  const Vector width = Vector::broadcast(static_cast<T>(geometry.width));
  const Vector height = Vector::broadcast(static_cast<T>(geometry.height));
  for (int64_t i = 0; i < count; i += Vector::kLanes) {
    Vector x, y;
    load_positions<Vector>(block.positions + 2 * i, x, y);
    const auto inside =
        Vector::both(Vector::both(less(before, x), less(x, width)), Vector::both(less(before, y), less(y, height)));
    x = select(inside, x, before);
    y = select(inside, y, height);
    const Vector mask = select(inside, Vector::load(block.masks + i), zero);
    const Vector cell_x = floor(x), cell_y = floor(y);
    const Vector u = x - cell_x, v = y - cell_y;
    const Vector top = mask * (one - v), bottom = mask * v;
    Vector::store_interleaved(points.weights + 4 * i, top * (one - u), top * u, bottom * (one - u), bottom * u);
    u.store(points.fractions_x + i);
    v.store(points.fractions_y + i);
    mask.store(points.masks + i);
    select(inside, one, zero).store(points.inside + i);
    store_offsets(points.offsets + i, cell_x, cell_y, x_step, y_step);
  }
}

// What one pixel's points give to and take from the maps. `grads` are the output's gradients, `vectors` vectors of them.
// With bands, dots are taken where `own`, and only cells' rows at offsets [first, last) are added to.
template <int64_t kPoints, int64_t kVectors, bool kBands, typename Vector, typename T>
DCNZOO_INLINE void scatter(
    const BackwardPoints<T>& block, int64_t place, int64_t points, const T* grads, int64_t vectors,
    const BorderedMap<const T>& values, const BorderedMap<T>& sums, bool own, int64_t first, int64_t last) {
  constexpr int64_t lanes = Vector::kLanes;
  const int64_t count = kPoints > 0 ? kPoints : points;
  const int64_t row = sums.row * static_cast<int64_t>(sizeof(T));
  const char* value_base = reinterpret_cast<const char*>(values.at(0, 0));
  char* sum_base = reinterpret_cast<char*>(sums.at(0, 0));
  Vector constant_grads[kVectors > 0 ? kVectors : 1];
  for (int64_t j = 0; j < kVectors; ++j) {
    constant_grads[j] = Vector::load(grads + j * lanes);
  }
  const auto grad = [&](int64_t j) {
    if constexpr (kVectors > 0) {
      return constant_grads[j];
    } else {
      return Vector::load(grads + j * lanes);
    }
  };
  const int64_t length = kVectors > 0 ? kVectors : vectors;
  for (int64_t k = place; k < place + count; ++k) {
    const int64_t offset = block.offsets[k];
    if (!kBands || own) {
      const T* top = reinterpret_cast<const T*>(value_base + offset);
      const T* bottom = reinterpret_cast<const T*>(value_base + offset + row);
      Vector dots[4] = {
          grad(0) * Vector::load(top), grad(0) * Vector::load(top + sums.pixel), grad(0) * Vector::load(bottom),
          grad(0) * Vector::load(bottom + sums.pixel)};
      for (int64_t j = 1; j < length; ++j) {
        dots[0] = fma(grad(j), Vector::load(top + j * lanes), dots[0]);
        dots[1] = fma(grad(j), Vector::load(top + sums.pixel + j * lanes), dots[1]);
        dots[2] = fma(grad(j), Vector::load(bottom + j * lanes), dots[2]);
        dots[3] = fma(grad(j), Vector::load(bottom + sums.pixel + j * lanes), dots[3]);
      }
      Vector::store_sums(block.dots + 4 * k, dots[0], dots[1], dots[2], dots[3]);
    }
    Vector weights[4];
    Vector::load_four(block.weights + 4 * k, weights);
    for (int64_t below = 0; below < 2; ++below) {
      const int64_t target_offset = offset + below * row;
      if (kBands && (target_offset < first || target_offset >= last)) {
        continue;
      }
      T* target = reinterpret_cast<T*>(sum_base + target_offset);
      for (int64_t j = 0; j < length; ++j) {
        T* left_target = target + j * lanes;
        T* right_target = left_target + sums.pixel;
        const Vector left_sum = fma(weights[2 * below], grad(j), Vector::load(left_target));
        const Vector right_sum = fma(weights[2 * below + 1], grad(j), Vector::load(right_target));
        left_sum.store(left_target);
        right_sum.store(right_target);
      }
    }
  }
}

// The gradients of positions and masks from the dots.
template <typename Vector, typename T>
DCNZOO_INLINE void find_point_grads(const BackwardPoints<T>& points, int64_t count, T offset_scale) {
  constexpr int64_t lanes = Vector::kLanes;
  const Vector zero = Vector::broadcast(0), one = Vector::broadcast(1), scale = Vector::broadcast(offset_scale);
  for (int64_t i = 0; i < count; i += lanes) {
    Vector left[2], right[2], top_left, top_right, bottom_left, bottom_right;
    for (int64_t half = 0; half < 2; ++half) {
      const T* dots = points.dots + 4 * i + 2 * half * lanes;
      Vector::split_pairs(Vector::load(dots), Vector::load(dots + lanes), left[half], right[half]);
    }
    Vector::split_pairs(left[0], left[1], top_left, bottom_left);
    Vector::split_pairs(right[0], right[1], top_right, bottom_right);
    const Vector u = Vector::load(points.fractions_x + i), v = Vector::load(points.fractions_y + i);
    const auto inside = less(zero, Vector::load(points.inside + i));
    const Vector factor = Vector::load(points.masks + i) * scale;
    const Vector across = (one - v) * (top_right - top_left) + v * (bottom_right - bottom_left);
    const Vector down = (one - u) * (bottom_left - top_left) + u * (bottom_right - top_right);
    const Vector sample = (one - v) * ((one - u) * top_left + u * top_right) +
                          v * ((one - u) * bottom_left + u * bottom_right);
    Vector low, high;
    Vector::join_pairs(select(inside, factor * across, zero), select(inside, factor * down, zero), low, high);
    low.store(points.position_grads + 2 * i);
    high.store(points.position_grads + 2 * i + lanes);
    select(inside, sample, zero).store(points.mask_grads + i);
  }
}

// Writes the gradients of one pixel and group's numbers in offset_mask.
template <int64_t kPoints, typename Vector, typename T, typename O>
DCNZOO_INLINE void write_point_grads(
    const BlockPoints<T>& block, const BackwardPoints<T>& points, int64_t place, int64_t points_count, bool softmax,
    O* target) {
  constexpr int64_t lanes = Vector::kLanes;
  const int64_t count = kPoints > 0 ? kPoints : points_count;
  const T* position_grads = points.position_grads + 2 * place;
  const T* mask_grads = points.mask_grads + place;
  const T* masks = block.masks + place;
  for (int64_t i = 0; i < 2 * count; i += lanes) {
    store_up_to(Vector::load(position_grads + i), target + i, 2 * count - i);
  }
  target += 2 * count;
  if (!softmax) {
    for (int64_t i = 0; i < count; i += lanes) {
      store_up_to(Vector::load(mask_grads + i), target + i, count - i);
    }
    return;
  }
  Vector sums = Vector::broadcast(0);
  for (int64_t i = 0; i < count; i += lanes) {
    sums = fma(load_up_to<Vector>(masks + i, count - i), load_up_to<Vector>(mask_grads + i, count - i), sums);
  }
  const Vector mean = Vector::broadcast(sums.sum());
  for (int64_t i = 0; i < count; i += lanes) {
    store_up_to(Vector::load(masks + i) * (Vector::load(mask_grads + i) - mean), target + i, count - i);
  }
}

// Copies between a row of channels and a row of vectors, whose end is zero.
template <int64_t kVectors, typename Vector, typename S, typename T>
DCNZOO_INLINE void widen(const S* source, int64_t channels, int64_t vectors, T* target) {
  constexpr int64_t lanes = Vector::kLanes;
  for (int64_t j = 0; j < (kVectors > 0 ? kVectors : vectors); ++j) {
    const int64_t rest = kVectors > 0 ? lanes : channels - j * lanes;
    (rest >= lanes ? Vector::load(source + j * lanes) : Vector::load_first(source + j * lanes, rest))
        .store(target + j * lanes);
  }
}
template <int64_t kVectors, typename Vector, typename S, typename T>
DCNZOO_INLINE void narrow(const T* source, int64_t channels, int64_t vectors, S* target) {
  constexpr int64_t lanes = Vector::kLanes;
  for (int64_t j = 0; j < (kVectors > 0 ? kVectors : vectors); ++j) {
    const int64_t rest = kVectors > 0 ? lanes : channels - j * lanes;
    if (rest >= lanes) {
      Vector::load(source + j * lanes).store(target + j * lanes);
    } else {
      Vector::load(source + j * lanes).store_first(target + j * lanes, rest);
    }
  }
}

// kVectors vectors of channels, exactly, or any number of channels where it is 0.
template <int64_t kPoints, int64_t kVectors, bool kBands, typename Vector, typename V, typename O>
void backward_range(const Backward<V, O>& call, int64_t bands, int64_t begin, int64_t end) {
  using T = typename Vector::Scalar;
  constexpr int64_t lanes = Vector::kLanes;
  constexpr int64_t element = static_cast<int64_t>(sizeof(T));
  const Geometry& geometry = call.geometry;
  const int64_t count = kPoints > 0 ? kPoints : geometry.points, width = geometry.group_width;
  const int64_t vectors = (width + lanes - 1) / lanes, pixel_size = vectors * lanes;
  const int64_t row_size = (geometry.width + 2) * pixel_size, map_size = BorderedMap<T>::size(geometry, pixel_size);
  const int64_t capacity = kBlockItems * count + lanes, grid_capacity = 2 * count + lanes;

  Workspace workspace(
      2 * Workspace::bytes<T>(map_size) + Workspace::bytes<T>(pixel_size) + BlockPoints<T>::bytes(capacity) +
      BackwardPoints<T>::bytes(capacity) + Workspace::bytes<T>(grid_capacity));
  const BorderedMap<T> values{workspace.take<T>(map_size), row_size, pixel_size};
  const BorderedMap<T> sums{workspace.take<T>(map_size), row_size, pixel_size};
  T* grads = workspace.take<T>(pixel_size);
  const BlockPoints<T> block(workspace, capacity);
  const BackwardPoints<T> points(workspace, capacity);
  const T* grid = make_grid<T>(workspace, geometry, grid_capacity);
  const Vector scale = Vector::broadcast(static_cast<T>(geometry.offset_scale));

  for (int64_t index = begin; index < end; ++index) {
    const BackwardUnit unit(geometry, bands, index);
    for (int64_t y = 0; y < geometry.height; ++y) {
      for (int64_t x = 0; x < geometry.width; ++x) {
        widen<kVectors, Vector>(call.value.at(unit.n, y, x, unit.g * width), width, vectors, values.at(y, x));
      }
    }
    for (int64_t i = 0; i < map_size; i += lanes) {
      Vector::broadcast(0).store(sums.data + i);
    }

    const int64_t pixels = geometry.out_height * geometry.out_width;
    Pixel placed(geometry, 0), scattered = placed;
    for (int64_t block_begin = 0; block_begin < pixels; block_begin += kBlockItems) {
      const int64_t block_end = block_begin + kBlockItems < pixels ? block_begin + kBlockItems : pixels;
      int64_t place = 0;
      for (int64_t i = block_begin; i < block_end; ++i, placed.advance(geometry), place += count) {
        place_points<kPoints, Vector>(
            call.offset_mask.at(unit.n, placed.row, placed.column, 3 * count * unit.g), count, grid, scale,
            placed.template origin<Vector>(geometry), geometry.softmax, block, place);
      }
      find_bordered_cells<Vector>(
          block, points, place, geometry, static_cast<int32_t>(pixel_size * element),
          static_cast<int32_t>(row_size * element));
      place = 0;
      for (int64_t i = block_begin; i < block_end; ++i, scattered.advance(geometry), place += count) {
        widen<kVectors, Vector>(
            call.grad_output.at(unit.n, scattered.row, scattered.column, unit.g * width), width, vectors, grads);
        scatter<kPoints, kVectors, kBands, Vector>(
            points, place, count, grads, vectors, {values.data, row_size, pixel_size}, sums,
            i >= unit.first_pixel && i < unit.last_pixel, (unit.first_row * row_size - pixel_size) * element,
            (unit.last_row * row_size - pixel_size) * element);
      }
      find_point_grads<Vector>(points, place, static_cast<T>(geometry.offset_scale));
      place = 0;
      for (int64_t i = block_begin; i < block_end; ++i, place += count) {
        if (i >= unit.first_pixel && i < unit.last_pixel) {
          O* target = call.grad_offset_mask + (unit.n * pixels + i) * geometry.offset_mask_size;
          write_point_grads<kPoints, Vector>(
              block, points, place, count, geometry.softmax, target + 3 * count * unit.g);
          if (unit.g == geometry.groups - 1) {
            for (int64_t j = 3 * count * geometry.groups; j < geometry.offset_mask_size; ++j) {
              target[j] = O(0);
            }
          }
        }
      }
    }

    for (int64_t y = unit.first_row; y < unit.last_row; ++y) {
      for (int64_t x = 0; x < geometry.width; ++x) {
        V* target = call.grad_value + ((unit.n * geometry.height + y) * geometry.width + x) * geometry.channels;
        narrow<kVectors, Vector>(sums.at(y, x), width, vectors, target + unit.g * width);
      }
    }
  }
}

template <typename Vector, typename V, typename O>
void backward(const Backward<V, O>& call, int64_t bands, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Vector::kLanes;
  const int64_t width = call.geometry.group_width;
  if (bands > 1) {
    backward_range<0, 0, true, Vector>(call, bands, begin, end);
  } else if (call.geometry.points == 9 && width == 16) {
    backward_range<9, 16 / lanes, false, Vector>(call, bands, begin, end);
  } else if (call.geometry.points == 9 && width == 32) {
    backward_range<9, 32 / lanes, false, Vector>(call, bands, begin, end);
  } else {
    backward_range<0, 0, false, Vector>(call, bands, begin, end);
  }
}
