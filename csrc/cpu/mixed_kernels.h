// The routing of dynamic convolution and the mixing of its kernels on CPU, for inference: at batch 1 a network otherwise
// spends more time on these small calls than on their work. Gradients, other dtypes and other devices are the
// composition's, in dcnzoo/layers/dynamic_conv.py.
#pragma once

#include <optional>

#include "../common.h"

namespace dcnzoo {

// x (N, C, H, W), weight (E, C), bias (E) or none, experts (E, K), all float32 -> kernels (N, K): the experts' sum, each by
// its share. The logits of the shares are the linear map of x's average over its pixels, by temperature; the shares their
// sigmoid, or softmax over the experts.
Tensor mixed_kernels(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& experts, double temperature,
    bool softmax);

}  // namespace dcnzoo
