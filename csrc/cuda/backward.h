// The gradients of one sampling point, from the dots of the output's gradient with the sample's four corners.
#pragma once

#include "../sampling.h"

namespace dcnzoo {

template <typename T>
struct PointGradient {
  T dx, dy, mask;
};

// `slope` is the modulation scalar times the offset scale; corners are upper left, upper right, lower left, lower right.
template <typename T, typename Index>
DCNZOO_INLINE PointGradient<T> point_gradient(
    const Axis<T, Index>& y, const Axis<T, Index>& x, T slope, const T (&dots)[4]) {
  const T top = x.low_weight * dots[0] + x.high_weight * dots[1];
  const T bottom = x.low_weight * dots[2] + x.high_weight * dots[3];
  const T across = y.low_weight * (dots[1] - dots[0]) + y.high_weight * (dots[3] - dots[2]);
  return {slope * across, slope * (bottom - top), y.low_weight * top + y.high_weight * bottom};
}

}  // namespace dcnzoo
