// The plain kernels of multi-scale deformable attention: every size, type and layout, nothing outside the maps is read.
#include <vector>

#include "deform_attn_kernels.h"

namespace dcnzoo::cpu {
namespace {

// One sample: where it lies on its level, its weight, and its number among all of the call.
template <typename T>
struct Sample {
  const Level& level;
  Axis<T> x, y;
  T weight;
  int64_t index;

  bool inside() const { return (x.low_inside || x.high_inside) && (y.low_inside || y.high_inside); }
  bool has_corner(int64_t corner) const {
    return (corner & 1 ? x.high_inside : x.low_inside) && (corner & 2 ? y.high_inside : y.low_inside);
  }
  T corner_weight(int64_t corner) const {
    return (corner & 1 ? x.high_weight : x.low_weight) * (corner & 2 ? y.high_weight : y.low_weight);
  }
  // Among the pixels of all levels.
  int64_t corner_pixel(int64_t corner) const {
    return level.start + (y.low + (corner >> 1)) * level.width + x.low + (corner & 1);
  }
};

// Calls f(sample) for every sample of one query and head.
template <typename V, typename O, typename F>
void for_each_sample(const AttentionInput<V, O>& call, int64_t q, int64_t m, const F& f) {
  using T = Accumulator<V>;
  int64_t index = (q * call.sizes.heads + m) * call.sizes.samples();
  for (const Level& level : call.sizes.levels) {
    for (int64_t p = 0; p < call.sizes.points; ++p, ++index) {
      const T x = static_cast<T>(call.locations[2 * index]) * static_cast<T>(level.width) - T(0.5);
      const T y = static_cast<T>(call.locations[2 * index + 1]) * static_cast<T>(level.height) - T(0.5);
      f(Sample<T>{
          level, sample_axis(x, level.width), sample_axis(y, level.height), static_cast<T>(call.weights[index]), index});
    }
  }
}

template <typename V, typename O>
const V* corner_value(const AttentionInput<V, O>& call, int64_t q, int64_t m, int64_t pixel) {
  return call.value.at(q / call.sizes.queries, pixel, m, 0);
}

template <typename V, typename O>
std::vector<Accumulator<V>> read_gradient(const AttentionBackward<V, O>& call, int64_t q, int64_t m) {
  const V* source = call.grad_output + (q * call.sizes.heads + m) * call.sizes.depth;
  std::vector<Accumulator<V>> grads(call.sizes.depth);
  for (int64_t d = 0; d < call.sizes.depth; ++d) {
    grads[d] = static_cast<Accumulator<V>>(source[d]);
  }
  return grads;
}

}  // namespace

namespace plain {

template <typename V, typename O>
void attend_one(const AttentionForward<V, O>& call, int64_t q, int64_t m) {
  using T = Accumulator<V>;
  std::vector<T> sums(call.sizes.depth);
  for_each_sample(call, q, m, [&](const Sample<T>& sample) {
    for (int64_t corner = 0; corner < 4; ++corner) {
      if (sample.has_corner(corner)) {
        const T weight = sample.corner_weight(corner) * sample.weight;
        const V* source = corner_value(call, q, m, sample.corner_pixel(corner));
        for (int64_t d = 0; d < call.sizes.depth; ++d) {
          sums[d] += weight * static_cast<T>(source[d * call.value.strides[3]]);
        }
      }
    }
  });
  V* target = call.output + (q * call.sizes.heads + m) * call.sizes.depth;
  for (int64_t d = 0; d < call.sizes.depth; ++d) {
    target[d] = static_cast<V>(sums[d]);
  }
}

template <typename V, typename O>
void scatter_one(const AttentionBackward<V, O>& call, int64_t q, int64_t m, int64_t first_pixel, int64_t last_pixel) {
  using T = Accumulator<V>;
  const Attention& sizes = call.sizes;
  const std::vector<T> grads = read_gradient(call, q, m);
  for_each_sample(call, q, m, [&](const Sample<T>& sample) {
    for (int64_t corner = 0; corner < 4; ++corner) {
      const int64_t pixel = sample.corner_pixel(corner);
      if (sample.has_corner(corner) && pixel >= first_pixel && pixel < last_pixel) {
        const T weight = sample.corner_weight(corner) * sample.weight;
        T* target = call.grad_value + ((q / sizes.queries * sizes.pixels + pixel) * sizes.heads + m) * sizes.depth;
        for (int64_t d = 0; d < sizes.depth; ++d) {
          target[d] += weight * grads[d];
        }
      }
    }
  });
}

template <typename V, typename O>
void find_gradients_of_one(const AttentionBackward<V, O>& call, int64_t q, int64_t m) {
  using T = Accumulator<V>;
  const std::vector<T> grads = read_gradient(call, q, m);
  for_each_sample(call, q, m, [&](const Sample<T>& sample) {
    T dots[4] = {0, 0, 0, 0};  // of the gradient with the four corners' values
    for (int64_t corner = 0; corner < 4; ++corner) {
      if (sample.has_corner(corner)) {
        const V* source = corner_value(call, q, m, sample.corner_pixel(corner));
        for (int64_t d = 0; d < call.sizes.depth; ++d) {
          dots[corner] += grads[d] * static_cast<T>(source[d * call.value.strides[3]]);
        }
      }
    }
    const Axis<T>&x = sample.x, &y = sample.y;
    const T across = y.low_weight * (dots[1] - dots[0]) + y.high_weight * (dots[3] - dots[2]);
    const T down = x.low_weight * (dots[2] - dots[0]) + x.high_weight * (dots[3] - dots[1]);
    const T sum = y.low_weight * (x.low_weight * dots[0] + x.high_weight * dots[1]) +
                  y.high_weight * (x.low_weight * dots[2] + x.high_weight * dots[3]);
    // Outside the map the weight may be anything, even NaN: no gradient there.
    const bool inside = sample.inside();
    O* target = call.grad_locations + 2 * sample.index;
    target[0] = static_cast<O>(inside ? sample.weight * static_cast<T>(sample.level.width) * across : T(0));
    target[1] = static_cast<O>(inside ? sample.weight * static_cast<T>(sample.level.height) * down : T(0));
    call.grad_weights[sample.index] = static_cast<O>(inside ? sum : T(0));
  });
}

template <typename V, typename O>
void attend(const AttentionForward<V, O>& call, int64_t begin, int64_t end) {
  for (int64_t q = begin; q < end; ++q) {
    for (int64_t m = 0; m < call.sizes.heads; ++m) {
      attend_one(call, q, m);
    }
  }
}

template <typename V, typename O>
void attend_backward(const AttentionBackward<V, O>& call, int64_t bands, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const AttentionUnit unit(call.sizes, bands, index);
    for (int64_t q = 0; q < call.sizes.queries; ++q) {
      const int64_t query = unit.n * call.sizes.queries + q;
      scatter_one(call, query, unit.m, unit.first_pixel, unit.last_pixel);
      if (q >= unit.first_query && q < unit.last_query) {
        find_gradients_of_one(call, query, unit.m);
      }
    }
  }
}

#define INSTANTIATE(V, O)                                                                             \
  template void attend_one(const AttentionForward<V, O>&, int64_t, int64_t);                           \
  template void scatter_one(const AttentionBackward<V, O>&, int64_t, int64_t, int64_t, int64_t);       \
  template void find_gradients_of_one(const AttentionBackward<V, O>&, int64_t, int64_t);               \
  DCNZOO_INSTANTIATE_ATTENTION(V, O)
DCNZOO_FOR_ALL_TYPES(INSTANTIATE)

}  // namespace plain
}  // namespace dcnzoo::cpu
