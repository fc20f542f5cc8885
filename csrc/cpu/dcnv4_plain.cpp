// The plain kernels of DCNv4: every shape, type and layout, nothing outside the map is read.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace dcnzoo::cpu {
namespace {

// The sampling points of one output pixel and group. `masks` are what the samples are multiplied with: after the softmax,
// where there is one.
template <typename T>
struct Points {
  std::vector<T> x, y, masks;

  explicit Points(int64_t count) : x(count), y(count), masks(count) {}
};

template <typename T, typename O>
void find_points(
    const Geometry& geometry, const View<const O>& offset_mask, int64_t n, int64_t row, int64_t column, int64_t g,
    Points<T>& points) {
  const int64_t count = geometry.points;
  const T scale = static_cast<T>(geometry.offset_scale);
  const T origin_x = grid_origin<T>(
      column, geometry.stride_w, geometry.pad_w, geometry.dilation_w, geometry.kernel_w, geometry.offset_scale);
  const T origin_y = grid_origin<T>(
      row, geometry.stride_h, geometry.pad_h, geometry.dilation_h, geometry.kernel_h, geometry.offset_scale);
  const O* packed = offset_mask.at(n, row, column, 3 * count * g);
  const int64_t step = offset_mask.strides[3];
  for (int64_t k = 0; k < count; ++k) {
    const GridPoint point = grid_point(k, geometry);
    const T dx = static_cast<T>(packed[2 * k * step]);
    const T dy = static_cast<T>(packed[(2 * k + 1) * step]);
    points.x[k] = origin_x + (static_cast<T>(point.column * geometry.dilation_w) + dx) * scale;
    points.y[k] = origin_y + (static_cast<T>(point.row * geometry.dilation_h) + dy) * scale;
    points.masks[k] = static_cast<T>(packed[(2 * count + k) * step]);
  }
  if (geometry.softmax) {
    const T highest = *std::max_element(points.masks.begin(), points.masks.end());
    T total = 0;
    for (T& mask : points.masks) {
      mask = std::exp(mask - highest);
      total += mask;
    }
    for (T& mask : points.masks) {
      mask /= total;
    }
  }
}

// One output pixel and group.
template <typename V, typename O>
void aggregate(
    const Forward<V, O>& call, int64_t n, int64_t row, int64_t column, int64_t g, Points<Accumulator<V>>& points,
    std::vector<Accumulator<V>>& sums) {
  using T = Accumulator<V>;
  const Geometry& geometry = call.geometry;
  const int64_t width = geometry.group_width;
  find_points(geometry, call.offset_mask, n, row, column, g, points);
  std::fill(sums.begin(), sums.end(), T(0));
  for (int64_t k = 0; k < geometry.points; ++k) {
    const Axis<T> x = sample_axis(points.x[k], geometry.width);
    const Axis<T> y = sample_axis(points.y[k], geometry.height);
    for (int64_t corner = 0; corner < 4; ++corner) {
      const bool right = corner & 1, below = corner & 2;
      if (!(right ? x.high_inside : x.low_inside) || !(below ? y.high_inside : y.low_inside)) {
        continue;
      }
      const T weight =
          (right ? x.high_weight : x.low_weight) * (below ? y.high_weight : y.low_weight) * points.masks[k];
      const V* source = call.value.at(n, y.low + below, x.low + right, g * width);
      for (int64_t d = 0; d < width; ++d) {
        sums[d] += weight * static_cast<T>(source[d * call.value.strides[3]]);
      }
    }
  }
  V* target = call.output + ((n * geometry.out_height + row) * geometry.out_width + column) * geometry.channels + g * width;
  for (int64_t d = 0; d < width; ++d) {
    target[d] = static_cast<V>(sums[d]);
  }
}

}  // namespace

namespace plain {

template <typename V, typename O>
void forward_point(const Forward<V, O>& call, int64_t n, int64_t row, int64_t column, int64_t g) {
  Points<Accumulator<V>> points(call.geometry.points);
  std::vector<Accumulator<V>> sums(call.geometry.group_width);
  aggregate(call, n, row, column, g, points, sums);
}

template <typename V, typename O>
void forward_pixels(const Forward<V, O>& call, int64_t begin, int64_t end) {
  const Geometry& geometry = call.geometry;
  Points<Accumulator<V>> points(geometry.points);
  std::vector<Accumulator<V>> sums(geometry.group_width);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t column = pixel % geometry.out_width;
    const int64_t row = pixel / geometry.out_width % geometry.out_height;
    const int64_t n = pixel / geometry.out_width / geometry.out_height;
    for (int64_t g = 0; g < geometry.groups; ++g) {
      aggregate(call, n, row, column, g, points, sums);
    }
  }
}

template <typename V, typename O>
void backward_unit(const Backward<V, O>& call, const BackwardUnit& unit) {
  using T = Accumulator<V>;
  const Geometry& geometry = call.geometry;
  const int64_t width = geometry.group_width, count = geometry.points;
  const T scale = static_cast<T>(geometry.offset_scale);
  Points<T> points(count);
  std::vector<T> grads(width), mask_grads(count);
  std::vector<T> sums((unit.last_row - unit.first_row) * geometry.width * width);

  for (int64_t pixel = 0; pixel < geometry.out_height * geometry.out_width; ++pixel) {
    const int64_t row = pixel / geometry.out_width, column = pixel % geometry.out_width;
    const bool own = pixel >= unit.first_pixel && pixel < unit.last_pixel;
    find_points(geometry, call.offset_mask, unit.n, row, column, unit.g, points);
    const V* grad_source = call.grad_output.at(unit.n, row, column, unit.g * width);
    for (int64_t d = 0; d < width; ++d) {
      grads[d] = static_cast<T>(grad_source[d * call.grad_output.strides[3]]);
    }
    O* target = call.grad_offset_mask +
                (unit.n * geometry.out_height * geometry.out_width + pixel) * geometry.offset_mask_size +
                3 * count * unit.g;
    for (int64_t k = 0; k < count; ++k) {
      const Axis<T> x = sample_axis(points.x[k], geometry.width);
      const Axis<T> y = sample_axis(points.y[k], geometry.height);
      T dots[4] = {0, 0, 0, 0};  // of the gradient with the four corners' values
      for (int64_t corner = 0; corner < 4; ++corner) {
        const bool right = corner & 1, below = corner & 2;
        if (!(right ? x.high_inside : x.low_inside) || !(below ? y.high_inside : y.low_inside)) {
          continue;
        }
        const int64_t corner_y = y.low + below, corner_x = x.low + right;
        if (own) {
          const V* source = call.value.at(unit.n, corner_y, corner_x, unit.g * width);
          for (int64_t d = 0; d < width; ++d) {
            dots[corner] += grads[d] * static_cast<T>(source[d * call.value.strides[3]]);
          }
        }
        if (corner_y >= unit.first_row && corner_y < unit.last_row) {
          const T weight = (right ? x.high_weight : x.low_weight) * (below ? y.high_weight : y.low_weight) *
                           points.masks[k];
          T* sum = sums.data() + ((corner_y - unit.first_row) * geometry.width + corner_x) * width;
          for (int64_t d = 0; d < width; ++d) {
            sum[d] += weight * grads[d];
          }
        }
      }
      if (own) {
        // Outside the map mask may be anything, even NaN: no gradient there.
        const bool inside = (x.low_inside || x.high_inside) && (y.low_inside || y.high_inside);
        const T factor = inside ? points.masks[k] * scale : T(0);
        const T across = y.low_weight * (dots[1] - dots[0]) + y.high_weight * (dots[3] - dots[2]);
        const T down = x.low_weight * (dots[2] - dots[0]) + x.high_weight * (dots[3] - dots[1]);
        mask_grads[k] = y.low_weight * (x.low_weight * dots[0] + x.high_weight * dots[1]) +
                        y.high_weight * (x.low_weight * dots[2] + x.high_weight * dots[3]);
        target[2 * k] = static_cast<O>(inside ? factor * across : T(0));
        target[2 * k + 1] = static_cast<O>(inside ? factor * down : T(0));
      }
    }
    if (own) {
      T shift = 0;
      if (geometry.softmax) {
        for (int64_t k = 0; k < count; ++k) {
          shift += points.masks[k] * mask_grads[k];
        }
      }
      for (int64_t k = 0; k < count; ++k) {
        const T grad = geometry.softmax ? points.masks[k] * (mask_grads[k] - shift) : mask_grads[k];
        target[2 * count + k] = static_cast<O>(grad);
      }
      if (unit.g == geometry.groups - 1) {
        std::fill(target + 3 * count, target + geometry.offset_mask_size - 3 * count * unit.g, O(0));
      }
    }
  }

  const T* sum = sums.data();
  for (int64_t y = unit.first_row; y < unit.last_row; ++y) {
    for (int64_t x = 0; x < geometry.width; ++x, sum += width) {
      V* target = call.grad_value + ((unit.n * geometry.height + y) * geometry.width + x) * geometry.channels + unit.g * width;
      for (int64_t d = 0; d < width; ++d) {
        target[d] = static_cast<V>(sum[d]);
      }
    }
  }
}

template <typename V, typename O>
void backward_units(const Backward<V, O>& call, int64_t bands, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    backward_unit(call, BackwardUnit(call.geometry, bands, i));
  }
}

#define INSTANTIATE(V, O)                                                                    \
  template void forward_point(const Forward<V, O>&, int64_t, int64_t, int64_t, int64_t); \
  DCNZOO_INSTANTIATE_KERNELS(V, O)
DCNZOO_FOR_ALL_TYPES(INSTANTIATE)

}  // namespace plain
}  // namespace dcnzoo::cpu
