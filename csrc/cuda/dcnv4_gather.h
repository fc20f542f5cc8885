// The gradient of the value map, gathered: the entry point that dcnv4_backward.cu calls.
#pragma once

#include "tensors.h"

namespace dcnzoo {

// Writes grad_value, (N, H, W, C) and contiguous, in value's dtype. Bit-reproducible: every element is a sum in a fixed
// order. grad_output and offset_mask have contiguous channels; `wide` says that 16-byte reads can be made of grad_output
// and that 32-bit indices do.
void gather_grad_value(
    const DeviceScope& device, const Geometry& geometry, const Tensor& grad_output, const Tensor& offset_mask,
    Tensor& grad_value, bool wide);

}  // namespace dcnzoo
