// The operator's entry points, one implementation in each library, and the shape arithmetic they share.
#pragma once

#include <cstdint>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace dcnzoo {

using torch::stable::Tensor;

// value (N, H, W, C), offset_mask (N, Ho, Wo, P) -> (N, Ho, Wo, C), contiguous.
Tensor dcnv4(
    const Tensor& value, const Tensor& offset_mask, int64_t groups, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
    int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, double offset_scale,
    bool remove_center, bool softmax);

// grad_output (N, Ho, Wo, C) -> gradients of value and offset_mask, contiguous, each in its tensor's dtype.
std::tuple<Tensor, Tensor> dcnv4_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& offset_mask, int64_t groups, int64_t kernel_h,
    int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
    int64_t dilation_w, double offset_scale, bool remove_center, bool softmax, bool deterministic);

}  // namespace dcnzoo
