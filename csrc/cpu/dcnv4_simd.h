// DCNv4 in vectors. Included within a region compiled for one instruction set, where VectorFor<V> is the vector that values
// of a type are computed in.
#pragma once

namespace {
#include "dcnv4_points.h"
// And then
#include "dcnv4_backward.h"
#include "dcnv4_forward.h"
}  // namespace

template <typename V, typename O>
void forward_pixels(const Forward<V, O>& call, int64_t begin, int64_t end) {
  forward<VectorFor<V>>(call, begin, end);
}

template <typename V, typename O>
void backward_units(const Backward<V, O>& call, int64_t bands, int64_t begin, int64_t end) {
  backward<VectorFor<V>>(call, bands, begin, end);
}

DCNZOO_FOR_ALL_TYPES(DCNZOO_INSTANTIATE_KERNELS)
