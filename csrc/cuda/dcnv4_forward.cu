// DCNv4 forward on CUDA. A lane sums one 16-byte vector of channels of one output pixel; see partition.h for how the work
// is dealt out and samples.h for how the lanes of a pair share its sampling points.
#include "../dcnv4.h"

#include "samples.h"
#include "tensors.h"

namespace dcnzoo {
namespace {

constexpr int kWarps = 8, kBlocks = 3;  // per block; per multiprocessor at least, which bounds the registers

template <typename T, typename Offset, typename Index>
struct Forward {
  Image<const T, Index> value;
  Image<const Offset, Index> offset_mask;
  T* output;  // contiguous
  Index out_height, out_width;
  int64_t channels, group_width;
  Grid<Compute<T>, Index> grid;
  Partition<Index> partition;
};

template <typename T, typename Offset, int kSize, typename Index>
__global__ void __launch_bounds__(kWarps * kWarp, kBlocks)
    forward_kernel(const __grid_constant__ Forward<T, Offset, Index> call) {
  using C = Compute<T>;
  using Lanes = Vector<T, kSize>;
  __shared__ Record<C, Index> shared_records[kWarps][2][kWarp];
  auto& records = shared_records[threadIdx.x / kWarp];

  const auto& grid = call.grid;
  const int32_t lanes = call.partition.lanes, points = grid.points;
  const Place<Index> place = find_place<kWarps>(call.partition);
  if (!place.warp_active) {
    return;
  }
  const Offset* packed = call.offset_mask.at(place.image, place.row, place.column) + place.group * 3 * points;
  const C window_y = static_cast<C>(place.row) * grid.stride_y + grid.origin_y;
  const C window_x = static_cast<C>(place.column) * grid.stride_x + grid.origin_x;
  Softmax<C> softmax{};
  if (grid.softmax) {
    softmax = read_softmax<C>(packed, points);
  }

  for (int32_t round = 0; round < call.partition.rounds; ++round) {
    const int64_t wanted = static_cast<int64_t>(round * lanes + place.lane) * kSize;
    const bool writes = place.active && wanted < call.group_width;
    const int64_t channel = place.group * call.group_width + (wanted < call.group_width ? wanted : 0);
    const auto* map = reinterpret_cast<const Lanes*>(call.value.data + place.image * call.value.image_step + channel);
    C total[kSize] = {};

    // Each lane places one point out of every `lanes`, and reads the next one's numbers ahead.
    PointReader<Offset> reader(packed, place.lane, lanes, points);
    GridWalk<C, Index> walk(grid, place.lane);
    Point<Offset> next{};
    if (place.lane < points) {
      next = reader.next();
    }
    int buffer = 0;
    for (int32_t first = 0; first < points; first += lanes, buffer ^= 1) {
      bool interior = true;
      const int32_t own = first + place.lane;
      if (own < points) {
        const C raw = static_cast<C>(next.mask), mask = grid.softmax ? softmax(raw) : raw;
        const auto sample = dcnzoo::place(grid, window_y, window_x, walk, next, mask);
        interior = sample.is_interior();
        records[buffer][threadIdx.x % kWarp] = Record<C, Index>(sample, grid);
      }
      walk.advance(grid);
      if (own + lanes < points) {
        next = reader.next();
      }
      __syncwarp();

      const auto* shared = records[buffer] + place.first_lane;
      const int32_t count = points - first < lanes ? points - first : lanes;
      const auto add = [&](auto is_interior) {
        for (int32_t point = 0; point < count; ++point) {
          const Record<C, Index> record = shared[point];
          const auto corners = read_corners<decltype(is_interior)::value>(map, record, grid);
          const CornerWeights<C> weights(record);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
              total[i] += weights.weight[c] * static_cast<C>(corners.vector[c].element[i]);
            }
          }
        }
      };
      if (__all_sync(kAllLanes, interior)) {
        add(std::true_type{});
      } else {
        add(std::false_type{});
      }
    }

    if (writes) {
      Lanes out;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        out.element[i] = static_cast<T>(total[i]);
      }
      const int64_t pixel = (place.image * call.out_height + place.row) * call.out_width + place.column;
      *reinterpret_cast<Lanes*>(call.output + pixel * call.channels + channel) = out;
    }
  }
}

template <typename T, typename Offset, int kSize, typename Index>
void run(
    const DeviceScope& device, const Geometry& geometry, const Tensor& value, const Tensor& offset_mask,
    Tensor& output) {
  const Partition<Index> partition(
      geometry.batch, geometry.out_height, geometry.out_width, geometry.groups, geometry.group_width, kSize, kWarps);
  const Forward<T, Offset, Index> call{
      value,
      offset_mask,
      static_cast<T*>(output.mutable_data_ptr()),
      static_cast<Index>(geometry.out_height),
      static_cast<Index>(geometry.out_width),
      geometry.channels,
      geometry.group_width,
      Grid<Compute<T>, Index>(geometry, value.stride(1) / kSize, value.stride(2) / kSize, partition.lanes),
      partition};
  device.launch(forward_kernel<T, Offset, kSize, Index>, partition.blocks, kWarps * kWarp, call);
}

}  // namespace

Tensor dcnv4(
    const Tensor& value, const Tensor& offset_mask, int64_t groups, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
    int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, double offset_scale,
    bool remove_center, bool softmax) {
  const Geometry geometry = check_arguments(
      value, offset_mask, groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
      offset_scale, remove_center, softmax);
  const DeviceScope device(value);
  Tensor output = torch::stable::new_empty(
      value, {geometry.batch, geometry.out_height, geometry.out_width, geometry.channels});
  const Tensor offsets = with_contiguous_channels(offset_mask);
  const Tensor map = with_contiguous_channels(value);
  dispatch_types(value.scalar_type(), offset_mask.scalar_type(), [&](auto value_tag, auto offset_tag) {
    using T = typename decltype(value_tag)::type;
    using Offset = typename decltype(offset_tag)::type;
    if (is_vectorizable(geometry, kWide<T>, {&map, &offsets})) {
      run<T, Offset, kWide<T>, int32_t>(device, geometry, aligned(map), offsets, output);
    } else {
      run<T, Offset, 1, int64_t>(device, geometry, map, offsets, output);
    }
  });
  return output;
}

}  // namespace dcnzoo
