// What both devices' entry points share: the operator's geometry, the last checks, and the switch over dtypes.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace dcnzoo {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The sizes of one call, in elements; plain data, so that it can be handed to a GPU kernel by value.
struct Geometry {
  int64_t batch, height, width, channels;
  int64_t groups, group_width;  // channels = groups * group_width
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t points;            // sampling points per output pixel and group
  int64_t offset_mask_size;  // P, the channels of offset_mask, of which 3 * groups * points count
  double offset_scale;
  bool remove_center, softmax;
};

inline int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  return (size + 2 * pad - (dilation * (kernel - 1) + 1)) / stride + 1;
}

// Checks the arguments as a last guard (the Python function has raised a better error before) and returns the sizes.
inline Geometry check_arguments(
    const Tensor& value, const Tensor& offset_mask, int64_t groups, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
    int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, double offset_scale,
    bool remove_center, bool softmax) {
  STD_TORCH_CHECK(value.dim() == 4, "value must have 4 dimensions (N, H, W, C), got ", value.dim());
  STD_TORCH_CHECK(offset_mask.dim() == 4, "offset_mask must have 4 dimensions (N, Ho, Wo, P), got ", offset_mask.dim());
  STD_TORCH_CHECK(
      kernel_h > 0 && kernel_w > 0 && stride_h > 0 && stride_w > 0 && dilation_h > 0 && dilation_w > 0 && pad_h >= 0 &&
          pad_w >= 0,
      "kernel, stride and dilation must be positive and padding not negative, got kernel ", kernel_h, " x ", kernel_w,
      ", stride ", stride_h, " x ", stride_w, ", dilation ", dilation_h, " x ", dilation_w, ", padding ", pad_h, " x ",
      pad_w);
  STD_TORCH_CHECK(
      !remove_center || (kernel_h == kernel_w && kernel_h % 2 == 1 && kernel_h > 1),
      "remove_center needs an odd square kernel of at least 3, got ", kernel_h, " x ", kernel_w);

  Geometry geometry{};
  geometry.batch = value.size(0);
  geometry.height = value.size(1);
  geometry.width = value.size(2);
  geometry.channels = value.size(3);
  STD_TORCH_CHECK(
      geometry.height > 0 && geometry.width > 0 && geometry.channels > 0,
      "value must have at least one row, column and channel, got ", geometry.height, " x ", geometry.width, " x ",
      geometry.channels);
  STD_TORCH_CHECK(
      groups > 0 && geometry.channels % groups == 0, "groups must be positive and divide the ", geometry.channels,
      " channels, got ", groups);
  geometry.groups = groups;
  geometry.group_width = geometry.channels / groups;
  geometry.out_height = output_size(geometry.height, kernel_h, stride_h, pad_h, dilation_h);
  geometry.out_width = output_size(geometry.width, kernel_w, stride_w, pad_w, dilation_w);
  STD_TORCH_CHECK(
      geometry.out_height > 0 && geometry.out_width > 0, "the kernel does not fit into the value map of ",
      geometry.height, " x ", geometry.width, " pixels");
  geometry.kernel_h = kernel_h;
  geometry.kernel_w = kernel_w;
  geometry.stride_h = stride_h;
  geometry.stride_w = stride_w;
  geometry.pad_h = pad_h;
  geometry.pad_w = pad_w;
  geometry.dilation_h = dilation_h;
  geometry.dilation_w = dilation_w;
  geometry.points = kernel_h * kernel_w - (remove_center ? 1 : 0);
  geometry.offset_mask_size = offset_mask.size(3);
  geometry.offset_scale = offset_scale;
  geometry.remove_center = remove_center;
  geometry.softmax = softmax;
  STD_TORCH_CHECK(
      offset_mask.size(0) == geometry.batch && offset_mask.size(1) == geometry.out_height &&
          offset_mask.size(2) == geometry.out_width && offset_mask.size(3) >= 3 * groups * geometry.points,
      "offset_mask must have shape (", geometry.batch, ", ", geometry.out_height, ", ", geometry.out_width,
      ", at least ", 3 * groups * geometry.points, "), got (", offset_mask.size(0), ", ", offset_mask.size(1), ", ",
      offset_mask.size(2), ", ", offset_mask.size(3), ")");
  return geometry;
}

inline void check_grad_output(const Tensor& grad_output, const Tensor& value, const Geometry& geometry) {
  STD_TORCH_CHECK(
      grad_output.dim() == 4 && grad_output.size(0) == geometry.batch && grad_output.size(1) == geometry.out_height &&
          grad_output.size(2) == geometry.out_width && grad_output.size(3) == geometry.channels,
      "grad_output must have the output's shape (", geometry.batch, ", ", geometry.out_height, ", ", geometry.out_width,
      ", ", geometry.channels, ")");
  STD_TORCH_CHECK(grad_output.scalar_type() == value.scalar_type(), "grad_output must have value's dtype");
}

// A type as an argument of a generic lambda.
template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<value's type>, TypeTag<offset_mask's type>) for the mixtures that the operator takes.
template <typename F>
void dispatch_types(ScalarType value, ScalarType offset_mask, const F& f) {
  if (value == ScalarType::Float && offset_mask == ScalarType::Float) {
    f(TypeTag<float>{}, TypeTag<float>{});
  } else if (value == ScalarType::Half && offset_mask == ScalarType::Half) {
    f(TypeTag<Half>{}, TypeTag<Half>{});
  } else if (value == ScalarType::Half && offset_mask == ScalarType::Float) {
    f(TypeTag<Half>{}, TypeTag<float>{});
  } else if (value == ScalarType::BFloat16 && offset_mask == ScalarType::BFloat16) {
    f(TypeTag<BFloat16>{}, TypeTag<BFloat16>{});
  } else if (value == ScalarType::BFloat16 && offset_mask == ScalarType::Float) {
    f(TypeTag<BFloat16>{}, TypeTag<float>{});
  } else if (value == ScalarType::Double && offset_mask == ScalarType::Double) {
    f(TypeTag<double>{}, TypeTag<double>{});
  } else {
    STD_TORCH_CHECK(
        false, "value must be float64, float32, float16 or bfloat16 and offset_mask of the same type, or float32 beside a ",
        "half value; got scalar types ", static_cast<int>(value), " and ", static_cast<int>(offset_mask));
  }
}

}  // namespace dcnzoo
