// The interface between multi-scale deformable attention on CPU and its kernels, each compiled for one instruction set.
#pragma once

#include "../deform_attn.h"
#include "kernels.h"

namespace dcnzoo::cpu {

// What both passes read. Strides of value: image, pixel, head, channel; the other tensors are contiguous.
template <typename V, typename O>
struct AttentionInput {
  const Attention& sizes;
  View<const V> value;
  const O* locations;
  const O* weights;
};

template <typename V, typename O>
struct AttentionForward : AttentionInput<V, O> {
  V* output;
};

template <typename V, typename O>
struct AttentionBackward : AttentionInput<V, O> {
  const V* grad_output;
  Accumulator<V>* grad_value;  // zero at first
  O* grad_locations;
  O* grad_weights;
};

// A piece of the backward pass: for one image and head, adds up the gradient of the pixels [first_pixel, last_pixel) over
// all queries in their order, and finds the gradients of the queries [first_query, last_query).
struct AttentionUnit {
  int64_t n, m, first_pixel, last_pixel, first_query, last_query;

  AttentionUnit(const Attention& sizes, int64_t bands, int64_t index) {
    const int64_t plane = index / bands, band = index % bands;
    n = plane / sizes.heads;
    m = plane % sizes.heads;
    first_pixel = sizes.pixels * band / bands;
    last_pixel = sizes.pixels * (band + 1) / bands;
    first_query = sizes.queries * band / bands;
    last_query = sizes.queries * (band + 1) / bands;
  }
};

// The plain kernels for one query `q`, counted over the batch, and head: every size and layout, and no pixel is read or
// written that is not a sample's own.
namespace plain {
template <typename V, typename O>
void attend_one(const AttentionForward<V, O>& call, int64_t q, int64_t m);
template <typename V, typename O>
void scatter_one(const AttentionBackward<V, O>& call, int64_t q, int64_t m, int64_t first_pixel, int64_t last_pixel);
template <typename V, typename O>
void find_gradients_of_one(const AttentionBackward<V, O>& call, int64_t q, int64_t m);
}  // namespace plain

// The kernels: forward for queries [begin, end), counted over the batch, backward for the units [begin, end) of a split
// into images, heads and bands. All but the plain ones want the channels of value to be contiguous, and levels whose
// pixels can be counted in float32.
#define DCNZOO_DECLARE_KERNELS(name)                                                                 \
  namespace name {                                                                                   \
  template <typename V, typename O>                                                                  \
  void attend(const AttentionForward<V, O>& call, int64_t begin, int64_t end);                       \
  template <typename V, typename O>                                                                  \
  void attend_backward(const AttentionBackward<V, O>& call, int64_t bands, int64_t begin, int64_t end); \
  }
DCNZOO_DECLARE_KERNELS(plain)
DCNZOO_DECLARE_KERNELS(portable)
DCNZOO_DECLARE_KERNELS(avx2)
DCNZOO_DECLARE_KERNELS(avx512)
#undef DCNZOO_DECLARE_KERNELS

#define DCNZOO_INSTANTIATE_ATTENTION(V, O)                                     \
  template void attend(const AttentionForward<V, O>&, int64_t, int64_t);       \
  template void attend_backward(const AttentionBackward<V, O>&, int64_t, int64_t, int64_t);

}  // namespace dcnzoo::cpu
