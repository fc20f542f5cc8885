// Multi-scale deformable attention: the entry points, one implementation in each library, and what they share.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "common.h"

namespace dcnzoo {

// value (N, S, M, D), sampling_locations (N, Q, M, L, P, 2), attention_weights (N, Q, M, L, P) -> (N, Q, M * D), contiguous.
// spatial_shapes: height and width of the first level, of the second, and so on.
Tensor deform_attn(
    const Tensor& value, const Tensor& sampling_locations, const Tensor& attention_weights,
    const std::vector<int64_t>& spatial_shapes);

// grad_output (N, Q, M * D) -> gradients of the three tensors, contiguous, each in its tensor's dtype.
std::tuple<Tensor, Tensor, Tensor> deform_attn_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& sampling_locations, const Tensor& attention_weights,
    const std::vector<int64_t>& spatial_shapes, bool deterministic);

// A feature map: its size, and the place of its first pixel among those of all levels.
struct Level {
  int64_t height, width, start;
};

// The sizes of one call.
struct Attention {
  int64_t batch, pixels, heads, depth;  // of value
  int64_t queries, points;              // points per level
  std::vector<Level> levels;

  int64_t samples() const { return static_cast<int64_t>(levels.size()) * points; }  // per query and head
};

// Checks the arguments as a last guard (the Python function has raised a better error before) and returns the sizes.
inline Attention check_attention(
    const Tensor& value, const Tensor& sampling_locations, const Tensor& attention_weights,
    const std::vector<int64_t>& spatial_shapes) {
  STD_TORCH_CHECK(value.dim() == 4, "value must have 4 dimensions (N, S, M, D), got ", value.dim());
  STD_TORCH_CHECK(
      sampling_locations.dim() == 6 && attention_weights.dim() == 5,
      "sampling_locations and attention_weights must have 6 and 5 dimensions, got ", sampling_locations.dim(), " and ",
      attention_weights.dim());
  STD_TORCH_CHECK(spatial_shapes.size() % 2 == 0, "spatial_shapes must be pairs, got ", spatial_shapes.size(), " numbers");
  Attention sizes{value.size(0), value.size(1), value.size(2), value.size(3), sampling_locations.size(1),
                  sampling_locations.size(4), {}};
  int64_t start = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    const Level level{spatial_shapes[i], spatial_shapes[i + 1], start};
    STD_TORCH_CHECK(
        level.height > 0 && level.width > 0, "levels must have pixels, got one of ", level.height, " x ", level.width);
    sizes.levels.push_back(level);
    start += level.height * level.width;
  }
  STD_TORCH_CHECK(
      start == sizes.pixels && sizes.heads > 0 && sizes.depth > 0, "value must have shape (N, ", start,
      ", M, D), M and D positive, got (", sizes.batch, ", ", sizes.pixels, ", ", sizes.heads, ", ", sizes.depth, ")");
  STD_TORCH_CHECK(sizes.samples() > 0, "there must be a level and a point, got ", sizes.levels.size(), " and ", sizes.points);
  const int64_t shape[] = {sizes.batch,  sizes.queries, sizes.heads, static_cast<int64_t>(sizes.levels.size()),
                           sizes.points, 2};
  for (int dim = 0; dim < 6; ++dim) {
    STD_TORCH_CHECK(
        sampling_locations.size(dim) == shape[dim] && (dim == 5 || attention_weights.size(dim) == shape[dim]),
        "sampling_locations and attention_weights must have ", shape[dim], " as their size in dimension ", dim);
  }
  STD_TORCH_CHECK(
      sampling_locations.scalar_type() == attention_weights.scalar_type(),
      "sampling_locations and attention_weights must have the same dtype");
  return sizes;
}

inline void check_attention_gradient(const Tensor& grad_output, const Tensor& value, const Attention& sizes) {
  STD_TORCH_CHECK(
      grad_output.dim() == 3 && grad_output.size(0) == sizes.batch && grad_output.size(1) == sizes.queries &&
          grad_output.size(2) == sizes.heads * sizes.depth,
      "grad_output must have the output's shape (", sizes.batch, ", ", sizes.queries, ", ", sizes.heads * sizes.depth, ")");
  STD_TORCH_CHECK(grad_output.scalar_type() == value.scalar_type(), "grad_output must have value's dtype");
}

}  // namespace dcnzoo
