// Tensors as the kernels take them, and the choice between the vector and the scalar kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "device.h"
#include "partition.h"

namespace dcnzoo {

// A (N, H, W, C) tensor with contiguous channels.
template <typename T, typename Index>
struct Image {
  T* data;
  int64_t image_step;
  Index row_step, column_step;

  Image(const Tensor& tensor)
      : data(static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()))),
        image_step(tensor.stride(0)),
        row_step(static_cast<Index>(tensor.stride(1))),
        column_step(static_cast<Index>(tensor.stride(2))) {}
  __device__ __forceinline__ T* at(int64_t image, Index row, Index column) const {
    return data + image * image_step + row * row_step + column * column_step;
  }
};

inline Tensor with_contiguous_channels(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// Whether every pixel starts at a multiple of 16 bytes.
inline bool is_aligned(const Tensor& tensor) {
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int dim = 0; dim < 3; ++dim) {
    aligned = aligned && (tensor.size(dim) == 1 || tensor.stride(dim) * tensor.element_size() % 16 == 0);
  }
  return aligned;
}

// The tensor itself, or a copy that 16-byte reads can be made of.
inline Tensor aligned(const Tensor& tensor) {
  if (is_aligned(tensor)) {
    return tensor;
  }
  return tensor.is_contiguous() ? torch::stable::clone(tensor) : torch::stable::contiguous(tensor);
}

// Bytes from an image's first element to its last.
inline int64_t image_extent(const Tensor& tensor) {
  return ((tensor.size(1) - 1) * tensor.stride(1) + (tensor.size(2) - 1) * tensor.stride(2) + tensor.size(3)) *
         tensor.element_size();
}

// Whether the vector kernels, with their 32-bit indices, can serve a call; the scalar ones with 64-bit indices serve all.
inline bool is_vectorizable(const Geometry& geometry, int64_t vector, std::initializer_list<const Tensor*> tensors) {
  constexpr int64_t kExact = int64_t{1} << 24;  // integers below are exact in float32
  bool fits = geometry.group_width % vector == 0 && geometry.height < kExact && geometry.width < kExact;
  for (const Tensor* tensor : tensors) {
    fits = fits && image_extent(*tensor) < kInt32Max;
  }
  const int64_t pairs = geometry.out_height * geometry.out_width * geometry.groups;
  const int64_t elements = geometry.height * geometry.width * geometry.channels;  // an expanded map has a small extent
  constexpr int64_t kLeastPairs = 4;  // of a block
  return fits && elements < kInt32Max && pairs < kInt32Max / 2 && geometry.batch * pairs / kLeastPairs < kInt32Max;
}

}  // namespace dcnzoo
