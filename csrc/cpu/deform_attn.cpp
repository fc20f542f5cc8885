// Multi-scale deformable attention on CPU: the entry points, the choice of kernels and the split over threads.
#include "../deform_attn.h"

#include <algorithm>
#include <type_traits>

#include <torch/csrc/stable/ops.h>

#include "capability.h"
#include "deform_attn_kernels.h"
#include "tensors.h"

namespace dcnzoo {
namespace {

using namespace cpu;

template <typename V, typename O>
struct Kernels {
  void (*forward)(const AttentionForward<V, O>&, int64_t begin, int64_t end);
  void (*backward)(const AttentionBackward<V, O>&, int64_t bands, int64_t begin, int64_t end);
};

// The vectorised kernels count a level's pixels in float32.
bool is_countable(const Attention& sizes) {
  constexpr int64_t kExact = int64_t{1} << 24;
  return std::all_of(sizes.levels.begin(), sizes.levels.end(), [](const Level& level) {
    return level.height <= kExact && level.width <= kExact && level.height * level.width <= kExact;
  });
}

template <typename V, typename O>
Kernels<V, O> choose_kernels(const Attention& sizes) {
  if (!is_countable(sizes)) {
    return {plain::attend<V, O>, plain::attend_backward<V, O>};
  }
#ifdef DCNZOO_X86_64
  switch (capability()) {
    case Capability::kAvx512:
      return {avx512::attend<V, O>, avx512::attend_backward<V, O>};
    case Capability::kAvx2:
      return {avx2::attend<V, O>, avx2::attend_backward<V, O>};
    case Capability::kPortable:
      break;
  }
#endif
  return {portable::attend<V, O>, portable::attend_backward<V, O>};
}

template <typename V, typename O>
AttentionInput<V, O> read(
    const Attention& sizes, const Tensor& value, const Tensor& locations, const Tensor& weights) {
  return {
      sizes,
      {static_cast<const V*>(value.const_data_ptr()), {value.stride(0), value.stride(1), value.stride(2), value.stride(3)}},
      static_cast<const O*>(locations.const_data_ptr()),
      static_cast<const O*>(weights.const_data_ptr())};
}

}  // namespace

Tensor deform_attn(
    const Tensor& value, const Tensor& sampling_locations, const Tensor& attention_weights,
    const std::vector<int64_t>& spatial_shapes) {
  const Attention sizes = check_attention(value, sampling_locations, attention_weights, spatial_shapes);
  const Tensor map = with_contiguous_channels(value), locations = torch::stable::contiguous(sampling_locations);
  const Tensor weights = torch::stable::contiguous(attention_weights);
  Tensor output = new_empty(value, std::array{sizes.batch, sizes.queries, sizes.heads * sizes.depth});
  dispatch_types(value.scalar_type(), locations.scalar_type(), [&](auto value_tag, auto other_tag) {
    using V = typename decltype(value_tag)::type;
    using O = typename decltype(other_tag)::type;
    const AttentionForward<V, O> call{
        read<V, O>(sizes, map, locations, weights), static_cast<V*>(output.mutable_data_ptr())};
    const auto kernel = choose_kernels<V, O>(sizes).forward;
    // Below some ten microseconds of work a second thread costs more than it brings.
    const int64_t grain = divide_up(65536, std::max<int64_t>(sizes.samples() * sizes.heads * sizes.depth, 1));
    torch::stable::parallel_for(
        0, sizes.batch * sizes.queries, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> deform_attn_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& sampling_locations, const Tensor& attention_weights,
    const std::vector<int64_t>& spatial_shapes, bool /* always deterministic */) {
  const Attention sizes = check_attention(value, sampling_locations, attention_weights, spatial_shapes);
  check_attention_gradient(grad_output, value, sizes);
  const Tensor grads = torch::stable::contiguous(grad_output), map = with_contiguous_channels(value);
  const Tensor locations = torch::stable::contiguous(sampling_locations);
  const Tensor weights = torch::stable::contiguous(attention_weights);
  Tensor grad_value = value;
  Tensor grad_locations = torch::stable::new_empty(sampling_locations, sampling_locations.sizes());
  Tensor grad_weights = torch::stable::new_empty(attention_weights, attention_weights.sizes());
  dispatch_types(value.scalar_type(), locations.scalar_type(), [&](auto value_tag, auto other_tag) {
    using V = typename decltype(value_tag)::type;
    using O = typename decltype(other_tag)::type;
    using T = Accumulator<V>;
    grad_value = torch::stable::new_zeros(
        value, value.sizes(), std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float);
    const AttentionBackward<V, O> call{
        read<V, O>(sizes, map, locations, weights),
        static_cast<const V*>(grads.const_data_ptr()),
        static_cast<T*>(grad_value.mutable_data_ptr()),
        static_cast<O*>(grad_locations.mutable_data_ptr()),
        static_cast<O*>(grad_weights.mutable_data_ptr())};
    const auto kernel = choose_kernels<V, O>(sizes).backward;

    // Every element of grad_value is added up by one thread in the order of the queries, so that the result does not
    // depend on the split: by image and head, and where these are fewer than the threads, by bands of pixels too.
    const int64_t planes = sizes.batch * sizes.heads;
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t bands = std::min(sizes.pixels, divide_up(threads, std::max<int64_t>(planes, 1)));
    torch::stable::parallel_for(0, planes * bands, 1, [&](int64_t begin, int64_t end) {
      kernel(call, bands, begin, end);
    });
    if (!std::is_same_v<T, V>) {
      grad_value = torch::stable::to(grad_value, value.scalar_type());
    }
  });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace dcnzoo
