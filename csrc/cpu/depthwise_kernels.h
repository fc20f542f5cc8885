// The interface between depthwise convolution on CPU and its kernels, each compiled for one instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace dcnzoo::cpu {

// The sizes of a convolution along one side of the map.
struct Side {
  int64_t size, out_size, kernel, stride, pad, dilation;

  // Where in the input a tap of the kernel lies, perhaps outside.
  int64_t source(int64_t out, int64_t tap) const { return out * stride - pad + tap * dilation; }
  // The first output whose tap lies at `source` or behind.
  int64_t first_out(int64_t source, int64_t tap) const {
    const int64_t distance = source + pad - tap * dilation;
    return distance <= 0 ? 0 : std::min((distance + stride - 1) / stride, out_size);
  }
};

// For every position of one map along a side, the taps that reach a position of the other map from there, in their order.
class Reach {
 public:
  struct Tap {
    int64_t tap, other;
  };

  // From the output into the input, or backward from the input into the output.
  Reach(const Side& side, bool backward) : step(backward ? 1 : side.stride), starts_{0} {
    for (int64_t position = 0; position < (backward ? side.size : side.out_size); ++position) {
      for (int64_t tap = 0; tap < side.kernel; ++tap) {
        if (backward) {
          const int64_t out = side.first_out(position, tap);
          if (out < side.out_size && side.source(out, tap) == position) {
            taps_.push_back({tap, out});
          }
        } else {
          const int64_t source = side.source(position, tap);
          if (source >= 0 && source < side.size) {
            taps_.push_back({tap, source});
          }
        }
      }
      starts_.push_back(taps_.size());
    }
    alike_.assign(size(), 1);
    for (int64_t position = size() - 2; position >= 0; --position) {
      const bool same = std::equal(
          begin(position), end(position), begin(position + 1), end(position + 1),
          [this](const Tap& a, const Tap& b) { return a.tap == b.tap && a.other + step == b.other; });
      alike_[position] = same ? alike_[position + 1] + 1 : 1;
    }
  }

  int64_t size() const { return static_cast<int64_t>(starts_.size()) - 1; }
  const Tap* begin(int64_t position) const { return taps_.data() + starts_[position]; }
  const Tap* end(int64_t position) const { return taps_.data() + starts_[position + 1]; }
  // How many positions from this one on have the same taps, each with the other positions `step` further.
  int64_t alike(int64_t position) const { return alike_[position]; }

  const int64_t step;

 private:
  std::vector<Tap> taps_;
  std::vector<size_t> starts_;
  std::vector<int64_t> alike_;
};

// target[n, y, x] = the sum over taps of source[n, y', x'] * kernels[n, tap], each a vector of channels: the output from
// the input, or the input's gradient from the output's.
struct DepthwiseGather {
  int64_t channels, source_height, source_width, kernel_h, kernel_w;
  const Reach& rows;
  const Reach& columns;
  const float* source;
  const float* kernels;  // (N, kernel_h * kernel_w, C)
  float* target;
};

struct DepthwiseCorrelation {
  int64_t channels;
  Side rows, columns;
  const float* grad_output;
  const float* x;
  float* grad_kernels;  // (N, C, kernel_h * kernel_w)
};

constexpr int64_t kCorrelatedChannels = 64;  // of one unit

struct DepthwisePlanes {
  Side rows, columns;
  const float* x;        // (N * C, H, W)
  const float* kernels;  // (N * C, kernel_h * kernel_w)
  float* target;         // (N * C, Ho, Wo)
};

// The kernels: `gather` for rows of the target [begin, end), counted over the batch; `correlate` for units, each a few
// channels of one image; `convolve` for planes, each a channel of an image.
#define DCNZOO_DECLARE_KERNELS(name)                                             \
  namespace name {                                                               \
  void gather(const DepthwiseGather& call, int64_t begin, int64_t end);          \
  void correlate(const DepthwiseCorrelation& call, int64_t begin, int64_t end);  \
  void convolve(const DepthwisePlanes& call, int64_t begin, int64_t end);        \
  }
DCNZOO_DECLARE_KERNELS(portable)
DCNZOO_DECLARE_KERNELS(avx2)
DCNZOO_DECLARE_KERNELS(avx512)
#undef DCNZOO_DECLARE_KERNELS

}  // namespace dcnzoo::cpu
