// DCNv4 on CPU: entry points, the split over threads, and the plain kernels that serve every shape, type and layout.
#include "../dcnv4.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "../common.h"
#include "../sampling.h"

namespace dcnzoo {
namespace {

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A tensor's data and strides in elements.
template <typename T>
struct View {
  T* data;
  int64_t strides[4];

  T* at(int64_t n, int64_t y, int64_t x, int64_t c) const {
    return data + n * strides[0] + y * strides[1] + x * strides[2] + c * strides[3];
  }
};

template <typename T>
View<const T> read(const Tensor& tensor) {
  return {
      static_cast<const T*>(tensor.const_data_ptr()),
      {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

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

template <typename V, typename O>
void forward_pixels(
    const Geometry& geometry, const View<const V>& value, const View<const O>& offset_mask, V* output, int64_t begin,
    int64_t end) {
  using T = Accumulator<V>;
  const int64_t width = geometry.group_width;
  Points<T> points(geometry.points);
  std::vector<T> sums(width);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t column = pixel % geometry.out_width;
    const int64_t row = pixel / geometry.out_width % geometry.out_height;
    const int64_t n = pixel / geometry.out_width / geometry.out_height;
    for (int64_t g = 0; g < geometry.groups; ++g) {
      find_points(geometry, offset_mask, n, row, column, g, points);
      std::fill(sums.begin(), sums.end(), T(0));
      for (int64_t k = 0; k < geometry.points; ++k) {
        const Axis<T> x = sample_axis(points.x[k], geometry.width);
        const Axis<T> y = sample_axis(points.y[k], geometry.height);
        for (int64_t corner = 0; corner < 4; ++corner) {
          const bool right = corner & 1, below = corner & 2;
          if (!(right ? x.high_inside : x.low_inside) || !(below ? y.high_inside : y.low_inside)) {
            continue;
          }
          const T weight = (right ? x.high_weight : x.low_weight) * (below ? y.high_weight : y.low_weight) *
                           points.masks[k];
          const V* source = value.at(n, y.low + below, x.low + right, g * width);
          for (int64_t d = 0; d < width; ++d) {
            sums[d] += weight * static_cast<T>(source[d * value.strides[3]]);
          }
        }
      }
      V* target = output + pixel * geometry.channels + g * width;
      for (int64_t d = 0; d < width; ++d) {
        target[d] = static_cast<V>(sums[d]);
      }
    }
  }
}

// One image and group: adds up the gradient of the value map's rows [first_row, last_row) over all output pixels in
// their order, and finds the gradients of offsets and masks for the output pixels [first_pixel, last_pixel).
struct BackwardUnit {
  int64_t n, g, first_row, last_row, first_pixel, last_pixel;
};

template <typename V, typename O>
void backward_unit(
    const Geometry& geometry, const View<const V>& grad_output, const View<const V>& value,
    const View<const O>& offset_mask, V* grad_value, O* grad_offset_mask, const BackwardUnit& unit) {
  using T = Accumulator<V>;
  const int64_t width = geometry.group_width, count = geometry.points;
  const T scale = static_cast<T>(geometry.offset_scale);
  Points<T> points(count);
  std::vector<T> grads(width), mask_grads(count);
  std::vector<T> sums((unit.last_row - unit.first_row) * geometry.width * width);

  for (int64_t pixel = 0; pixel < geometry.out_height * geometry.out_width; ++pixel) {
    const int64_t row = pixel / geometry.out_width, column = pixel % geometry.out_width;
    const bool own = pixel >= unit.first_pixel && pixel < unit.last_pixel;
    find_points(geometry, offset_mask, unit.n, row, column, unit.g, points);
    const V* grad_source = grad_output.at(unit.n, row, column, unit.g * width);
    for (int64_t d = 0; d < width; ++d) {
      grads[d] = static_cast<T>(grad_source[d * grad_output.strides[3]]);
    }
    O* target = grad_offset_mask +
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
          const V* source = value.at(unit.n, corner_y, corner_x, unit.g * width);
          for (int64_t d = 0; d < width; ++d) {
            dots[corner] += grads[d] * static_cast<T>(source[d * value.strides[3]]);
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
      V* target = grad_value + ((unit.n * geometry.height + y) * geometry.width + x) * geometry.channels + unit.g * width;
      for (int64_t d = 0; d < width; ++d) {
        target[d] = static_cast<V>(sum[d]);
      }
    }
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Tensor dcnv4(
    const Tensor& value, const Tensor& offset_mask, int64_t groups, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
    int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, double offset_scale,
    bool remove_center, bool softmax) {
  const Geometry geometry = check_arguments(
      value, offset_mask, groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
      offset_scale, remove_center, softmax);
  Tensor output = torch::stable::new_empty(
      value, {geometry.batch, geometry.out_height, geometry.out_width, geometry.channels});
  dispatch_types(value.scalar_type(), offset_mask.scalar_type(), [&](auto value_tag, auto offset_tag) {
    using V = typename decltype(value_tag)::type;
    using O = typename decltype(offset_tag)::type;
    const View<const V> value_view = read<V>(value);
    const View<const O> offset_mask_view = read<O>(offset_mask);
    V* data = static_cast<V*>(output.mutable_data_ptr());
    const int64_t pixels = geometry.batch * geometry.out_height * geometry.out_width;
    const int64_t grain = std::max<int64_t>(1, 8192 / (geometry.points * geometry.channels));
    torch::stable::parallel_for(0, pixels, grain, [&](int64_t begin, int64_t end) {
      forward_pixels(geometry, value_view, offset_mask_view, data, begin, end);
    });
  });
  return output;
}

std::tuple<Tensor, Tensor> dcnv4_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& offset_mask, int64_t groups, int64_t kernel_h,
    int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
    int64_t dilation_w, double offset_scale, bool remove_center, bool softmax, bool /* always deterministic */) {
  const Geometry geometry = check_arguments(
      value, offset_mask, groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
      offset_scale, remove_center, softmax);
  check_grad_output(grad_output, value, geometry);
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  Tensor grad_offset_mask = torch::stable::new_empty(offset_mask, offset_mask.sizes());
  dispatch_types(value.scalar_type(), offset_mask.scalar_type(), [&](auto value_tag, auto offset_tag) {
    using V = typename decltype(value_tag)::type;
    using O = typename decltype(offset_tag)::type;
    const View<const V> grad_output_view = read<V>(grad_output);
    const View<const V> value_view = read<V>(value);
    const View<const O> offset_mask_view = read<O>(offset_mask);
    V* grad_value_data = static_cast<V*>(grad_value.mutable_data_ptr());
    O* grad_offset_mask_data = static_cast<O*>(grad_offset_mask.mutable_data_ptr());

    // Every element of grad_value is added up by one thread in the order of the output pixels, so that the result does
    // not depend on the split: by image and group, and where these are fewer than the threads, by bands of rows too.
    const int64_t planes = geometry.batch * geometry.groups;
    const int64_t pixels = geometry.out_height * geometry.out_width;
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t bands = std::min(geometry.height, divide_up(threads, std::max<int64_t>(planes, 1)));
    torch::stable::parallel_for(0, planes * bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t plane = i / bands, band = i % bands;
        const BackwardUnit unit{
            plane / geometry.groups,
            plane % geometry.groups,
            geometry.height * band / bands,
            geometry.height * (band + 1) / bands,
            pixels * band / bands,
            pixels * (band + 1) / bands};
        backward_unit(
            geometry, grad_output_view, value_view, offset_mask_view, grad_value_data, grad_offset_mask_data, unit);
      }
    });
  });
  return {grad_value, grad_offset_mask};
}

}  // namespace dcnzoo
