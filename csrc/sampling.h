// Bilinear sampling along one axis and the grid of sampling points, the same on CPU and GPU.
#pragma once

#include <cstdint>

#include "common.h"

#if defined(__CUDACC__)
#define DCNZOO_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define DCNZOO_INLINE __forceinline
#else
#define DCNZOO_INLINE inline __attribute__((always_inline))
#endif

namespace dcnzoo {

// A coordinate between two neighbouring pixels `low` and `low + 1`. Where the coordinate is not finite, or outside the
// open interval (-1, size), neither is on the map, and low is -1.
template <typename T, typename Index = int64_t>
struct Axis {
  Index low;
  bool low_inside, high_inside;
  T low_weight, high_weight;
};

template <typename T, typename Index>
DCNZOO_INLINE Axis<T, Index> sample_axis(T coordinate, Index size) {
  if (!(coordinate > T(-1) && coordinate < static_cast<T>(size))) {
    return {-1, false, false, T(0), T(0)};
  }
  Index low = static_cast<Index>(coordinate);  // truncates towards 0, so (-1, 0) needs its own case
  low = coordinate < T(0) ? Index(-1) : low;
  const T fraction = coordinate - static_cast<T>(low);
  return {low, low >= 0 && low < size, low + 1 < size, T(1) - fraction, fraction};
}

// The first coordinate of an output row or column's grid of sampling points, before offsets.
template <typename T>
DCNZOO_INLINE T grid_origin(int64_t index, int64_t stride, int64_t pad, int64_t dilation, int64_t kernel, double scale) {
  const int64_t center = (dilation * (kernel - 1)) >> 1;
  return static_cast<T>(index) * static_cast<T>(stride) +
         static_cast<T>(static_cast<double>(center - pad) - static_cast<double>(center) * scale);
}

// The position of sampling point k in the kernel's grid: points run x-outermost, the centre may be left out.
struct GridPoint {
  int64_t column, row;
};

DCNZOO_INLINE GridPoint grid_point(int64_t k, const Geometry& geometry) {
  const int64_t center = (geometry.kernel_w / 2) * geometry.kernel_h + geometry.kernel_h / 2;
  const int64_t cell = k + (geometry.remove_center && k >= center ? 1 : 0);
  return {cell / geometry.kernel_h, cell % geometry.kernel_h};
}

}  // namespace dcnzoo
