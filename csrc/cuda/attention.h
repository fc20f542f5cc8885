// Multi-scale deformable attention as its CUDA kernels see it. The unit of work is a pair (query, head), dealt out to lanes
// as DCNv4's pairs are: a lane owns one 16-byte vector of the head's channels at a time. The lanes of a pair place one sample
// each, and hand it to one another through shared memory.
#pragma once

#include "../deform_attn.h"
#include "backward.h"
#include "samples.h"
#include "tensors.h"

namespace dcnzoo {

constexpr int kAttentionWarps = 4;
constexpr int64_t kMostLevels = 32;  // what is handed to a kernel by value has room for

template <typename Index>
struct LevelSize {
  Index height, width, start;
};

template <typename T, typename Offset, typename Index>
struct AttentionCall {
  const T* value;
  int64_t image_step;
  Index pixel_step;   // in vectors
  int64_t head_step;  // in elements
  const Offset *locations, *weights;  // contiguous
  int64_t queries, heads, depth, pixels;
  int32_t samples;  // of a pair
  Divisor<int32_t> points;
  LevelSize<Index> levels[kMostLevels];
  Partition<Index> partition;

  AttentionCall(
      const Attention& sizes, const Tensor& value, const Tensor& locations, const Tensor& weights, int64_t vector)
      : value(static_cast<const T*>(value.const_data_ptr())),
        image_step(value.stride(0)),
        pixel_step(static_cast<Index>(value.stride(1) / vector)),
        head_step(value.stride(2)),
        locations(static_cast<const Offset*>(locations.const_data_ptr())),
        weights(static_cast<const Offset*>(weights.const_data_ptr())),
        queries(sizes.queries),
        heads(sizes.heads),
        depth(sizes.depth),
        pixels(sizes.pixels),
        samples(static_cast<int32_t>(sizes.samples())),
        points(sizes.points),
        levels{},
        partition(sizes.batch, 1, sizes.queries, sizes.heads, sizes.depth, vector, kAttentionWarps) {
    for (size_t i = 0; i < sizes.levels.size(); ++i) {
      const Level& level = sizes.levels[i];
      levels[i] = {static_cast<Index>(level.height), static_cast<Index>(level.width), static_cast<Index>(level.start)};
    }
  }
};

// A sample that a lane has placed, and the size of its level.
template <typename T, typename Index>
struct LevelSample {
  Sample<T, Index> sample;
  LevelSize<Index> level;

  // The first corner's pixel among those of all levels; it may be off the map.
  __device__ __forceinline__ Index pixel() const {
    return level.start + sample.y.low * level.width + sample.x.low;
  }
};

// The sample of that number among a pair's; `pair` counts the pairs of the whole call.
template <typename C, typename T, typename Offset, typename Index>
__device__ __forceinline__ LevelSample<C, Index> place_sample(
    const AttentionCall<T, Offset, Index>& call, int64_t pair, int32_t number) {
  const int64_t index = pair * call.samples + number;
  const LevelSize<Index> level = call.levels[call.points.divide(number)];
  const C x = static_cast<C>(call.locations[2 * index]) * static_cast<C>(level.width) - C(0.5);
  const C y = static_cast<C>(call.locations[2 * index + 1]) * static_cast<C>(level.height) - C(0.5);
  LevelSample<C, Index> placed{{locate(y, level.height), locate(x, level.width), C(0)}, level};
  placed.sample.mask = placed.sample.on_map() ? static_cast<C>(call.weights[index]) : C(0);
  return placed;
}

// A sample as lanes hand it to one another.
template <typename T, typename Index>
struct alignas(16) SampleRecord {
  T weight[4];         // of the corners: upper left, upper right, lower left, lower right
  Index pixel, width;  // the first corner's, and the step to the row below
  int32_t corners;     // a bit for each corner that is on the map

  SampleRecord() = default;
  __device__ __forceinline__ explicit SampleRecord(const LevelSample<T, Index>& placed)
      : pixel(placed.pixel()), width(placed.level.width), corners(0) {
    const CornerWeights<T> weights(placed.sample);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      weight[c] = weights.weight[c];
      corners |= placed.sample.has_corner(c) ? 1 << c : 0;
    }
  }

  __device__ __forceinline__ bool has_corner(int corner) const { return corners >> corner & 1; }
  __device__ __forceinline__ Index corner_pixel(int corner) const {
    return pixel + (corner & 1) + (corner & 2 ? width : Index(0));
  }
};

// A corner's channels, zero where it is outside the map, and not read there.
template <typename T, int kSize, typename C, typename Index>
__device__ __forceinline__ Vector<T, kSize> read_corner(
    const Vector<T, kSize>* map, Index pixel_step, const SampleRecord<C, Index>& record, int corner) {
  Vector<T, kSize> vector{};
  if (record.has_corner(corner)) {
    vector = map[record.corner_pixel(corner) * pixel_step];
  }
  return vector;
}

// A call's tensors, made fit for 16-byte reads where the vector kernels can serve it.
struct AttentionTensors {
  Tensor value, locations, weights;
  bool wide;

  AttentionTensors(
      const Attention& sizes, const Tensor& value_, const Tensor& locations_, const Tensor& weights_, int64_t vector)
      : value(with_contiguous_channels(value_)),
        locations(torch::stable::contiguous(locations_)),
        weights(torch::stable::contiguous(weights_)) {
    constexpr int64_t kExact = int64_t{1} << 24;  // integers below are exact in float32
    const int64_t pairs = sizes.queries * sizes.heads;
    wide = sizes.depth % vector == 0 && image_extent(value) < kInt32Max && sizes.pixels < kExact &&
           sizes.pixels * sizes.heads * sizes.depth < kInt32Max && sizes.batch * pairs < kInt32Max / 2;
    if (wide) {
      value = aligned(value);
    }
    STD_TORCH_CHECK(
        static_cast<int64_t>(sizes.levels.size()) <= kMostLevels, "the CUDA kernels take at most ", kMostLevels,
        " levels, got ", sizes.levels.size());
    STD_TORCH_CHECK(sizes.samples() < kInt32Max / 2, "too many points: ", sizes.samples());
  }
};

}  // namespace dcnzoo
