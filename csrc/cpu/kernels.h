// The interface between the CPU operator and its vectorised kernels, each compiled for one instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "../common.h"
#include "../sampling.h"

#if defined(__x86_64__) || (defined(_M_X64) && !defined(_M_ARM64EC))
#define DCNZOO_X86_64
#endif

namespace dcnzoo::cpu {

// Half types are computed in float32.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A tensor's data and its strides in elements.
template <typename T>
struct View {
  T* data;
  int64_t strides[4];

  T* at(int64_t n, int64_t y, int64_t x, int64_t c) const {
    return data + n * strides[0] + y * strides[1] + x * strides[2] + c * strides[3];
  }
};

template <typename V, typename O>
struct Forward {
  Geometry geometry;
  View<const V> value;
  View<const O> offset_mask;
  V* output;  // contiguous
};

template <typename V, typename O>
struct Backward {
  Geometry geometry;
  View<const V> grad_output, value;
  View<const O> offset_mask;
  V* grad_value;        // contiguous
  O* grad_offset_mask;  // contiguous
};

// A piece of the backward pass: for one image and group, adds up the gradient of the value map's rows
// [first_row, last_row) over all output pixels in their order, and finds the gradients of offsets and masks for the output
// pixels [first_pixel, last_pixel).
struct BackwardUnit {
  int64_t n, g, first_row, last_row, first_pixel, last_pixel;

  BackwardUnit(const Geometry& geometry, int64_t bands, int64_t index) {
    const int64_t pixels = geometry.out_height * geometry.out_width;
    const int64_t plane = index / bands, band = index % bands;
    n = plane / geometry.groups;
    g = plane % geometry.groups;
    first_row = geometry.height * band / bands;
    last_row = geometry.height * (band + 1) / bands;
    first_pixel = pixels * band / bands;
    last_pixel = pixels * (band + 1) / bands;
  }
};

// One output pixel and group by the plain kernel, which reads no corner outside the map.
namespace plain {
template <typename V, typename O>
void forward_point(const Forward<V, O>& call, int64_t n, int64_t row, int64_t column, int64_t g);
}

// Memory for arrays that are cut from it one after another, aligned for every vector type, zero at first.
class Workspace {
 public:
  explicit Workspace(int64_t bytes)
      : data_(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kAlignment))), next_(data_.get()) {
    std::memset(data_.get(), 0, static_cast<size_t>(bytes));
  }

  template <typename T>
  static int64_t bytes(int64_t count) {
    constexpr int64_t alignment = static_cast<int64_t>(kAlignment);
    return (count * static_cast<int64_t>(sizeof(T)) + alignment - 1) / alignment * alignment;
  }

  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return array;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(char* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<char[], Delete> data_;
  char* next_;
};

// The kernels: forward for output pixels [begin, end), counted over the batch, backward for the units [begin, end) of a
// split into images, groups and bands. All but the plain ones want channels of the inputs to be contiguous, images within
// 2^31 bytes, and heights and widths that are exact in float32.
#define DCNZOO_DECLARE_KERNELS(name)                                                          \
  namespace name {                                                                            \
  template <typename V, typename O>                                                           \
  void forward_pixels(const Forward<V, O>& call, int64_t begin, int64_t end);                 \
  template <typename V, typename O>                                                           \
  void backward_units(const Backward<V, O>& call, int64_t bands, int64_t begin, int64_t end); \
  }
DCNZOO_DECLARE_KERNELS(plain)
DCNZOO_DECLARE_KERNELS(portable)
DCNZOO_DECLARE_KERNELS(avx2)
DCNZOO_DECLARE_KERNELS(avx512)
#undef DCNZOO_DECLARE_KERNELS

#define DCNZOO_INSTANTIATE_KERNELS(V, O)                              \
  template void forward_pixels(const Forward<V, O>&, int64_t, int64_t); \
  template void backward_units(const Backward<V, O>&, int64_t, int64_t, int64_t);

// Expands `INSTANTIATE` for every mixture of types that dispatch_types knows.
#define DCNZOO_FOR_ALL_TYPES(INSTANTIATE) \
  INSTANTIATE(float, float)               \
  INSTANTIATE(double, double)             \
  INSTANTIATE(Half, Half)                 \
  INSTANTIATE(Half, float)                \
  INSTANTIATE(BFloat16, BFloat16)         \
  INSTANTIATE(BFloat16, float)

}  // namespace dcnzoo::cpu
