// Tensors as the operators on CPU take and make them.
#pragma once

#include <array>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "../common.h"

namespace dcnzoo::cpu {

// An uninitialised contiguous tensor of `like`'s dtype and device. torch::stable::new_empty looks its operator up by name
// at every call, a tenth of what a call takes on a small map.
template <size_t N>
Tensor new_empty(const Tensor& like, const std::array<int64_t, N>& sizes) {
  const auto check = [](AOTITorchError error) {  // the headers have a macro for it, of another name in each version
    STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "a tensor could not be made");
  };
  int32_t dtype, layout, device_type, device_index;
  check(aoti_torch_get_dtype(like.get(), &dtype));
  check(aoti_torch_get_layout(like.get(), &layout));
  check(aoti_torch_get_device_type(like.get(), &device_type));
  check(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle tensor;
  check(aoti_torch_aten_new_empty(
      like.get(), sizes.data(), N, &dtype, &layout, &device_type, device_index, nullptr, &tensor));
  return Tensor(tensor);
}

inline Tensor with_contiguous_channels(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dcnzoo::cpu
