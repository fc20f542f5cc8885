// The sampling points of a warp's pairs: computed once each by the lanes that share a pair, then exchanged.
#pragma once

#include "../sampling.h"
#include "device.h"
#include "partition.h"

namespace dcnzoo {

// What a kernel needs to place the sampling points; the map's steps in vectors.
template <typename T, typename Index>
struct Grid {
  Index height, width, row_step, column_step;
  T origin_y, origin_x, stride_y, stride_x, dilation_y, dilation_x, scale;
  int32_t points, center;  // center is the cell left out of the kernel's grid, or one behind its last
  Divisor<int32_t> kernel_h;
  bool softmax;

  Grid(const Geometry& geometry, int64_t row_step, int64_t column_step)
      : height(static_cast<Index>(geometry.height)),
        width(static_cast<Index>(geometry.width)),
        row_step(static_cast<Index>(row_step)),
        column_step(static_cast<Index>(column_step)),
        origin_y(grid_origin<T>(
            0, geometry.stride_h, geometry.pad_h, geometry.dilation_h, geometry.kernel_h, geometry.offset_scale)),
        origin_x(grid_origin<T>(
            0, geometry.stride_w, geometry.pad_w, geometry.dilation_w, geometry.kernel_w, geometry.offset_scale)),
        stride_y(static_cast<T>(geometry.stride_h)),
        stride_x(static_cast<T>(geometry.stride_w)),
        dilation_y(static_cast<T>(geometry.dilation_h)),
        dilation_x(static_cast<T>(geometry.dilation_w)),
        scale(static_cast<T>(geometry.offset_scale)),
        points(static_cast<int32_t>(geometry.points)),
        center(static_cast<int32_t>(
            geometry.remove_center ? (geometry.kernel_w / 2) * geometry.kernel_h + geometry.kernel_h / 2
                                   : geometry.kernel_h * geometry.kernel_w)),
        kernel_h(geometry.kernel_h),
        softmax(geometry.softmax) {}
};

// A sampling point's place in the kernel's grid, in pixels; points run down the grid's columns.
template <typename T>
struct Tap {
  T y, x;

  Tap() = default;
  template <typename Index>
  __device__ __forceinline__ Tap(const Grid<T, Index>& grid, int32_t point) {
    const int32_t cell = point + (point >= grid.center ? 1 : 0);
    const int32_t column = grid.kernel_h.divide(cell);
    y = static_cast<T>(cell - column * grid.kernel_h.divisor) * grid.dilation_y;
    x = static_cast<T>(column) * grid.dilation_x;
  }
};

// The numbers of one sampling point as they stand in memory.
template <typename Offset>
struct Point {
  Offset dx, dy, mask;
};

// Reads the numbers of every `step`-th point of a pair, one after another.
template <typename Offset>
class PointReader {
 public:
  __device__ __forceinline__ PointReader(const Offset* packed, int32_t first, int32_t step, int32_t points)
      : offset_(keep(packed + 2 * first)), mask_(keep(packed + 2 * points + first)), step_(step) {}
  __device__ __forceinline__ Point<Offset> next() {
    const Point<Offset> point{offset_[0], offset_[1], mask_[0]};
    offset_ += 2 * step_;
    mask_ += step_;
    return point;
  }

 private:
  const Offset *offset_, *mask_;
  int32_t step_;
};

// Softmax over a pair's modulation scalars, in the form exp(mask - largest) * inverse_sum.
template <typename T>
struct Softmax {
  T largest, inverse_sum;

  __device__ __forceinline__ T operator()(T mask) const { return std::exp(mask - largest) * inverse_sum; }
};

template <typename T, typename Offset>
__device__ __forceinline__ Softmax<T> read_softmax(const Offset* packed, int32_t points) {
  const Offset* masks = packed + 2 * points;
  T largest = static_cast<T>(masks[0]);
  for (int32_t point = 1; point < points; ++point) {
    const T mask = static_cast<T>(masks[point]);
    largest = mask > largest ? mask : largest;
  }
  T sum = 0;
  for (int32_t point = 0; point < points; ++point) {
    sum += std::exp(static_cast<T>(masks[point]) - largest);
  }
  return {largest, T(1) / sum};
}

// One sampling point on the value map. Where it is off the map the mask is 0, whatever it was.
template <typename T, typename Index>
struct Sample {
  Axis<T, Index> y, x;
  T mask;

  __device__ __forceinline__ bool on_map() const {
    return (x.low_inside | x.high_inside) & (y.low_inside | y.high_inside);
  }
  __device__ __forceinline__ bool has_corner(int corner) const {
    return (corner / 2 == 0 ? y.low_inside : y.high_inside) & (corner % 2 == 0 ? x.low_inside : x.high_inside);
  }
  __device__ __forceinline__ bool is_interior() const {
    return x.low_inside & x.high_inside & y.low_inside & y.high_inside;
  }
};

// As sample_axis, without branches.
template <typename T, typename Index>
__device__ __forceinline__ Axis<T, Index> locate(T coordinate, Index size) {
  using Unsigned = std::make_unsigned_t<Index>;
  Axis<T, Index> axis;
  round_down(coordinate, axis.low);
  const bool above = coordinate > T(-1);  // a number, too
  axis.low_inside = above & (static_cast<Unsigned>(axis.low) < static_cast<Unsigned>(size));
  axis.high_inside = above & (static_cast<Unsigned>(axis.low) + 1 < static_cast<Unsigned>(size));
  const bool on_map = above & (coordinate < static_cast<T>(size));
  const T fraction = on_map ? coordinate - static_cast<T>(axis.low) : T(0);
  axis.low_weight = T(1) - fraction;
  axis.high_weight = fraction;
  return axis;
}

template <typename T, typename Offset, typename Index>
__device__ __forceinline__ Sample<T, Index> place(
    const Grid<T, Index>& grid, T window_y, T window_x, const Tap<T>& tap, const Point<Offset>& point, T mask) {
  const T x = window_x + (tap.x + static_cast<T>(point.dx)) * grid.scale;
  const T y = window_y + (tap.y + static_cast<T>(point.dy)) * grid.scale;
  Sample<T, Index> sample{locate(y, grid.height), locate(x, grid.width), mask};
  sample.mask = sample.on_map() ? mask : T(0);
  return sample;
}

// A sample as lanes hand it to one another: the place of its upper left corner in vectors times 16, with a bit set for
// each corner (upper left, upper right, lower left, lower right) that is outside the map, and its weights.
template <typename T, typename Index>
struct alignas(16) Record {
  Index packed;
  T fraction_x, top, bottom;

  Record() = default;
  __device__ __forceinline__ Record(const Sample<T, Index>& sample, const Grid<T, Index>& grid)
      : fraction_x(sample.x.high_weight),
        top(sample.y.low_weight * sample.mask),
        bottom(sample.y.high_weight * sample.mask) {
    const int outside = (sample.x.low_inside ? 0 : 5) | (sample.x.high_inside ? 0 : 10) |
                        (sample.y.low_inside ? 0 : 3) | (sample.y.high_inside ? 0 : 12);
    packed = (sample.y.low * grid.row_step + sample.x.low * grid.column_step) * 16 + outside;
  }

  __device__ __forceinline__ Index place() const { return packed >> 4; }
  __device__ __forceinline__ bool has_corner(int corner) const { return (packed >> corner & 1) == 0; }
};

// The four corners of a sample, zero where they are outside the map, and never read there.
template <typename T, int kSize>
struct Corners {
  Vector<T, kSize> vector[4];
};

// `Source` says which corners there are: a Sample or a Record.
template <bool kInterior, typename T, int kSize, typename Source, typename Compute, typename Index>
__device__ __forceinline__ Corners<T, kSize> read_corners(
    const Vector<T, kSize>* map, Index place, const Source& source, const Grid<Compute, Index>& grid) {
  const Index steps[4] = {0, grid.column_step, grid.row_step, static_cast<Index>(grid.row_step + grid.column_step)};
  using Word = std::conditional_t<sizeof(T) % 4 == 0 || kSize % 2 == 0, uint32_t, uint16_t>;
  using Words = Vector<Word, sizeof(Vector<T, kSize>) / sizeof(Word)>;  // four-byte words are cheaper to set to 0 than halves
  Corners<T, kSize> corners;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    Words words{};
    if (kInterior || source.has_corner(c)) {
      words = *reinterpret_cast<const Words*>(map + place + steps[c]);
    }
    std::memcpy(&corners.vector[c], &words, sizeof(words));
  }
  return corners;
}

template <typename T>
struct CornerWeights {
  T weight[4];

  template <typename Index>
  __device__ __forceinline__ explicit CornerWeights(const Record<T, Index>& record)
      : weight{
            (T(1) - record.fraction_x) * record.top, record.fraction_x * record.top,
            (T(1) - record.fraction_x) * record.bottom, record.fraction_x * record.bottom} {}
  template <typename Index>
  __device__ __forceinline__ explicit CornerWeights(const Sample<T, Index>& sample) {
    const T top = sample.y.low_weight * sample.mask, bottom = sample.y.high_weight * sample.mask;
    weight[0] = sample.x.low_weight * top;
    weight[1] = sample.x.high_weight * top;
    weight[2] = sample.x.low_weight * bottom;
    weight[3] = sample.x.high_weight * bottom;
  }
};

constexpr int32_t kStagedPoints = 9;

// Some points of a warp's pairs in shared memory: for each pair `count` pairs (dx, dy), then `count` modulation scalars.
template <typename T, typename Offset>
struct PairStage {
  Offset numbers[kWarp][3 * kStagedPoints];
  Tap<T> taps[kStagedPoints];
};

// Fills it with points [first, first + count); every lane gives its pair's numbers as they stand in memory.
template <typename T, typename Offset, typename Index>
__device__ __forceinline__ void stage_pairs(
    PairStage<T, Offset>& stage, const Grid<T, Index>& grid, const Offset* packed, int32_t lanes, int32_t pairs,
    int32_t first, int32_t count) {
  static_assert(3 * kStagedPoints <= kWarp);
  const int32_t lane = threadIdx.x % kWarp;
  const int32_t source = lane < 2 * count ? 2 * first + lane : 2 * grid.points + first + lane - 2 * count;
  __syncwarp();
  if (lane < count) {
    stage.taps[lane] = Tap<T>(grid, first + lane);
  }
#pragma unroll 8
  for (int32_t pair = 0; pair < pairs; ++pair) {
    const auto* numbers = keep(reinterpret_cast<const Offset*>(
        __shfl_sync(kAllLanes, reinterpret_cast<uintptr_t>(packed), pair * lanes)));
    if (lane < 3 * count) {
      stage.numbers[pair][lane] = numbers[source];
    }
  }
  __syncwarp();
}

// Where a lane stands in the work: its pair, and which of the pair's vectors it reads first.
template <typename Index>
struct Place {
  int64_t image;
  Index group, row, column;
  int32_t slot;              // the pair's number in the warp
  int32_t first_lane, lane;  // the pair's first lane in the warp, and this lane's number in the pair
  bool warp_active, active;  // inactive lanes repeat the last pair's work and write nothing
};

template <int kWarps, typename Index>
__device__ __forceinline__ Place<Index> find_place(const Partition<Index>& partition) {
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t slot = partition.lanes_divisor.divide(lane);
  const Index block = static_cast<Index>(blockIdx.x);
  const Index row = partition.chunk_divisor.divide(block);
  const Index chunk = block - row * partition.chunk_divisor.divisor;
  const Index image = partition.image_divisor.divide(row);
  const Index slab = row - image * partition.image_divisor.divisor;

  const Index first = (chunk * kWarps + warp) * partition.pairs_per_warp;
  const Index last = partition.pairs - 1;
  const Index wanted = first + slot;
  const Index pair = wanted < last ? wanted : last;
  const Index pixel = partition.slab_divisor.divide(pair);
  const auto position = partition.order(pixel);
  const bool whole = slot < partition.pairs_per_warp;  // lanes are left over where `lanes` does not divide 32
  const int32_t first_lane = whole ? slot * partition.lanes : 0;

  Place<Index> place;
  place.image = image;
  place.group = slab * partition.slab_groups + pair - pixel * partition.slab_groups;
  place.row = position.row;
  place.column = position.column;
  place.slot = whole ? slot : 0;
  place.first_lane = first_lane;
  place.lane = lane - slot * partition.lanes;
  place.warp_active = first <= last;
  place.active = whole && wanted <= last;
  return place;
}

}  // namespace dcnzoo
