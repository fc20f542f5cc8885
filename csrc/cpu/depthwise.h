// Depthwise convolution on CPU with kernels of each sample's own. PyTorch convolves so only with the samples side by side as
// channels, which moves every value before and after where channels lie together, and works in copies of large maps where
// they do not. Other layouts, dtypes and devices are the composition's, in dcnzoo/ops/_mixed_conv.py.
#pragma once

#include <tuple>

#include "../common.h"

namespace dcnzoo {

// x (N, H, W, C), kernels (N, C * kernel_h * kernel_w), both float32 -> (N, Ho, Wo, C).
Tensor depthwise(
    const Tensor& x, const Tensor& kernels, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
    int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w);

// grad_output (N, Ho, Wo, C) -> the gradients of x and of kernels, with the same bits on any number of threads.
std::tuple<Tensor, Tensor> depthwise_backward(
    const Tensor& grad_output, const Tensor& x, const Tensor& kernels, int64_t kernel_h, int64_t kernel_w,
    int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w);

// x (N, C, H, W), kernels (N, C * kernel_h * kernel_w), both float32 -> (N, C, Ho, Wo).
Tensor depthwise_planes(
    const Tensor& x, const Tensor& kernels, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
    int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w);

}  // namespace dcnzoo
