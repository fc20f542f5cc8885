// Depthwise convolution with kernels per sample on CPU: the entry points, the choice of kernels and the split over threads.
#include "depthwise.h"

#include "capability.h"
#include "depthwise_kernels.h"
#include "tensors.h"

namespace dcnzoo {
namespace {

using namespace cpu;

constexpr int64_t kGrain = 65536;  // products that are worth a thread

struct Kernels {
  void (*gather)(const DepthwiseGather&, int64_t begin, int64_t end);
  void (*correlate)(const DepthwiseCorrelation&, int64_t begin, int64_t end);
  void (*convolve)(const DepthwisePlanes&, int64_t begin, int64_t end);
};

Kernels choose_kernels() {
#ifdef DCNZOO_X86_64
  switch (capability()) {
    case Capability::kAvx512:
      return {avx512::gather, avx512::correlate, avx512::convolve};
    case Capability::kAvx2:
      return {avx2::gather, avx2::correlate, avx2::convolve};
    case Capability::kPortable:
      break;
  }
#endif
  return {portable::gather, portable::correlate, portable::convolve};
}

struct Sizes {
  int64_t batch, channels;
  Side rows, columns;

  int64_t taps() const { return rows.kernel * columns.kernel; }
};

Side check_side(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  STD_TORCH_CHECK(
      kernel > 0 && stride > 0 && dilation > 0 && pad >= 0,
      "kernel, stride and dilation must be positive and padding not negative, got ", kernel, ", ", stride, ", ", dilation,
      " and ", pad);
  const Side side{size, output_size(size, kernel, stride, pad, dilation), kernel, stride, pad, dilation};
  STD_TORCH_CHECK(size > 0 && side.out_size > 0, "the kernel does not fit into ", size, " rows or columns");
  return side;
}

// `channel` is the dimension of the channels; height and width follow one another.
Sizes check(
    const Tensor& x, const Tensor& kernels, int64_t channel, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
    int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w) {
  STD_TORCH_CHECK(
      x.dim() == 4, "x must have 4 dimensions ", channel == 3 ? "(N, H, W, C)" : "(N, C, H, W)", ", got ", x.dim());
  const int64_t height = channel == 3 ? 1 : 2;
  const Sizes sizes{
      x.size(0), x.size(channel), check_side(x.size(height), kernel_h, stride_h, pad_h, dilation_h),
      check_side(x.size(height + 1), kernel_w, stride_w, pad_w, dilation_w)};
  STD_TORCH_CHECK(
      kernels.dim() == 2 && kernels.size(0) == sizes.batch && kernels.size(1) == sizes.channels * sizes.taps(),
      "kernels must have shape (", sizes.batch, ", ", sizes.channels * sizes.taps(), ")");
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::Float && kernels.scalar_type() == ScalarType::Float,
      "x and kernels must be float32");
  return sizes;
}

// (N, C, taps) -> (N, taps, C).
std::vector<float> with_channels_together(const Tensor& kernels, const Sizes& sizes) {
  const int64_t channels = sizes.channels, taps = sizes.taps();
  const Tensor packed = torch::stable::contiguous(kernels);
  const float* from = static_cast<const float*>(packed.const_data_ptr());
  std::vector<float> to(sizes.batch * taps * channels);
  torch::stable::parallel_for(
      0, sizes.batch, divide_up(kGrain, taps * channels + 1), [&](int64_t begin, int64_t end) {
        for (int64_t image = begin; image < end; ++image) {
          const int64_t first = image * channels * taps;
          for (int64_t tap = 0; tap < taps; ++tap) {
            for (int64_t channel = 0; channel < channels; ++channel) {
              to[first + tap * channels + channel] = from[first + channel * taps + tap];
            }
          }
        }
      });
  return to;
}

// The output from the input, or backward the input's gradient from the output's.
Tensor gather(const Tensor& source, const Tensor& kernels, const Sizes& sizes, bool backward) {
  const Reach rows(sizes.rows, backward), columns(sizes.columns, backward);
  const std::vector<float> taps = with_channels_together(kernels, sizes);
  Tensor target = new_empty(source, std::array{sizes.batch, rows.size(), columns.size(), sizes.channels});
  const DepthwiseGather call{
      sizes.channels,
      source.size(1),
      source.size(2),
      sizes.rows.kernel,
      sizes.columns.kernel,
      rows,
      columns,
      static_cast<const float*>(source.const_data_ptr()),
      taps.data(),
      static_cast<float*>(target.mutable_data_ptr())};
  const auto kernel = choose_kernels().gather;
  const int64_t grain = divide_up(kGrain, columns.size() * sizes.channels * sizes.taps() + 1);
  torch::stable::parallel_for(
      0, sizes.batch * rows.size(), grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return target;
}

}  // namespace

Tensor depthwise(
    const Tensor& x, const Tensor& kernels, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
    int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w) {
  const Sizes sizes =
      check(x, kernels, 3, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
  return gather(torch::stable::contiguous(x), kernels, sizes, false);
}

std::tuple<Tensor, Tensor> depthwise_backward(
    const Tensor& grad_output, const Tensor& x, const Tensor& kernels, int64_t kernel_h, int64_t kernel_w,
    int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w) {
  const Sizes sizes =
      check(x, kernels, 3, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
  STD_TORCH_CHECK(
      grad_output.dim() == 4 && grad_output.size(0) == sizes.batch && grad_output.size(1) == sizes.rows.out_size &&
          grad_output.size(2) == sizes.columns.out_size && grad_output.size(3) == sizes.channels &&
          grad_output.scalar_type() == ScalarType::Float,
      "grad_output must have the output's shape and dtype");
  const Tensor grads = torch::stable::contiguous(grad_output), map = torch::stable::contiguous(x);
  Tensor grad_kernels = new_empty(kernels, std::array{kernels.size(0), kernels.size(1)});
  const DepthwiseCorrelation call{
      sizes.channels,
      sizes.rows,
      sizes.columns,
      static_cast<const float*>(grads.const_data_ptr()),
      static_cast<const float*>(map.const_data_ptr()),
      static_cast<float*>(grad_kernels.mutable_data_ptr())};
  const auto kernel = choose_kernels().correlate;
  const int64_t units = sizes.batch * divide_up(sizes.channels, kCorrelatedChannels);
  const int64_t pixels = sizes.rows.out_size * sizes.columns.out_size;
  torch::stable::parallel_for(
      0, units, divide_up(kGrain, pixels * sizes.taps() * kCorrelatedChannels),
      [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return {gather(grads, kernels, sizes, true), grad_kernels};
}

Tensor depthwise_planes(
    const Tensor& x, const Tensor& kernels, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
    int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w) {
  const Sizes sizes =
      check(x, kernels, 1, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w);
  const Tensor map = torch::stable::contiguous(x), packed = torch::stable::contiguous(kernels);
  Tensor target =
      new_empty(x, std::array{sizes.batch, sizes.channels, sizes.rows.out_size, sizes.columns.out_size});
  const DepthwisePlanes call{
      sizes.rows, sizes.columns, static_cast<const float*>(map.const_data_ptr()),
      static_cast<const float*>(packed.const_data_ptr()), static_cast<float*>(target.mutable_data_ptr())};
  const auto kernel = choose_kernels().convolve;
  const int64_t products = sizes.rows.out_size * sizes.columns.out_size * sizes.taps();
  torch::stable::parallel_for(
      0, sizes.batch * sizes.channels, divide_up(kGrain, products),
      [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return target;
}

}  // namespace dcnzoo
