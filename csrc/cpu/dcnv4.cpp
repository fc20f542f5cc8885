// DCNv4 on CPU: the entry points, the choice of kernels and the split over threads.
#include "../dcnv4.h"

#include <algorithm>
#include <type_traits>

#include <torch/csrc/stable/ops.h>

#include "../common.h"
#include "capability.h"
#include "kernels.h"
#include "tensors.h"

namespace dcnzoo {
namespace {

using namespace cpu;

template <typename T>
View<const T> read(const Tensor& tensor) {
  return {
      static_cast<const T*>(tensor.const_data_ptr()),
      {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

// Whether the vectorised kernels can address the map: int32 offsets in bytes, coordinates exact in float32. The backward
// kernels copy one group's channels, widened to vectors, into a map with a border.
bool is_addressable(const Tensor& value, const Geometry& geometry) {
  constexpr int64_t kBytes = int64_t{1} << 31, kExact = int64_t{1} << 24;
  if (geometry.height > kExact || geometry.width > kExact) {
    return false;
  }
  const int64_t extent = (geometry.height - 1) * value.stride(1) + (geometry.width - 1) * value.stride(2);
  return extent + geometry.channels <= kBytes / static_cast<int64_t>(value.element_size());
}
bool is_addressable_with_border(const Geometry& geometry) {
  constexpr int64_t kBytes = int64_t{1} << 31, kVector = 64;
  const int64_t pixel = geometry.group_width * static_cast<int64_t>(sizeof(double)) + kVector;
  return (geometry.height + 3) * (geometry.width + 2) <= kBytes / pixel;
}

template <typename V, typename O>
struct Kernels {
  void (*forward)(const Forward<V, O>&, int64_t begin, int64_t end);
  void (*backward)(const Backward<V, O>&, int64_t bands, int64_t begin, int64_t end);
};

template <typename V, typename O>
Kernels<V, O> choose_kernels(bool addressable) {
  if (!addressable) {
    return {plain::forward_pixels<V, O>, plain::backward_units<V, O>};
  }
#ifdef DCNZOO_X86_64
  switch (capability()) {
    case Capability::kAvx512:
      return {avx512::forward_pixels<V, O>, avx512::backward_units<V, O>};
    case Capability::kAvx2:
      return {avx2::forward_pixels<V, O>, avx2::backward_units<V, O>};
    case Capability::kPortable:
      break;
  }
#endif
  return {portable::forward_pixels<V, O>, portable::backward_units<V, O>};
}

}  // namespace

Tensor dcnv4(
    const Tensor& value, const Tensor& offset_mask, int64_t groups, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
    int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, double offset_scale,
    bool remove_center, bool softmax) {
  const Geometry geometry = check_arguments(
      value, offset_mask, groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
      offset_scale, remove_center, softmax);
  const Tensor packed_value = with_contiguous_channels(value), packed_offsets = with_contiguous_channels(offset_mask);
  Tensor output = new_empty(
      value, std::array{geometry.batch, geometry.out_height, geometry.out_width, geometry.channels});
  dispatch_types(value.scalar_type(), offset_mask.scalar_type(), [&](auto value_tag, auto offset_tag) {
    using V = typename decltype(value_tag)::type;
    using O = typename decltype(offset_tag)::type;
    const Forward<V, O> call{
        geometry, read<V>(packed_value), read<O>(packed_offsets), static_cast<V*>(output.mutable_data_ptr())};
    const auto kernel = choose_kernels<V, O>(is_addressable(packed_value, geometry)).forward;
    // Below some ten microseconds of work a second thread costs more than it brings.
    const int64_t grain = divide_up(65536, geometry.points * geometry.channels);
    torch::stable::parallel_for(
        0, geometry.batch * geometry.out_height * geometry.out_width, grain,
        [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
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
  const Tensor packed_grads = with_contiguous_channels(grad_output), packed_value = with_contiguous_channels(value);
  const Tensor packed_offsets = with_contiguous_channels(offset_mask);
  Tensor grad_value = new_empty(value, std::array{geometry.batch, geometry.height, geometry.width, geometry.channels});
  Tensor grad_offset_mask = new_empty(
      offset_mask, std::array{geometry.batch, geometry.out_height, geometry.out_width, geometry.offset_mask_size});
  dispatch_types(value.scalar_type(), offset_mask.scalar_type(), [&](auto value_tag, auto offset_tag) {
    using V = typename decltype(value_tag)::type;
    using O = typename decltype(offset_tag)::type;
    const Backward<V, O> call{
        geometry,
        read<V>(packed_grads),
        read<V>(packed_value),
        read<O>(packed_offsets),
        static_cast<V*>(grad_value.mutable_data_ptr()),
        static_cast<O*>(grad_offset_mask.mutable_data_ptr())};
    const auto kernel =
        choose_kernels<V, O>(is_addressable(packed_value, geometry) && is_addressable_with_border(geometry)).backward;

    // Every element of grad_value is added up by one thread in the order of the output pixels, so that the result does
    // not depend on the split: by image and group, and where these are fewer than the threads, by bands of rows too.
    const int64_t planes = geometry.batch * geometry.groups;
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t bands = std::min(geometry.height, divide_up(threads, std::max<int64_t>(planes, 1)));
    torch::stable::parallel_for(0, planes * bands, 1, [&](int64_t begin, int64_t end) {
      kernel(call, bands, begin, end);
    });
  });
  return {grad_value, grad_offset_mask};
}

}  // namespace dcnzoo
