// DCNv4 forward on CUDA. A lane sums one or two 16-byte vectors of channels of one output pixel. The offsets and modulation
// scalars of a warp's pairs are brought to shared memory first, so that each is read from global memory once.
#include "../dcnv4.h"

#include "samples.h"
#include "tensors.h"

namespace dcnzoo {
namespace {

constexpr int kWarps = 4;
constexpr int kBlocks = 5;  // per multiprocessor at least, which bounds the registers

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

template <typename T, typename Offset, int kSize, int kVectors, typename Index>
__global__ void __launch_bounds__(kWarps * kWarp, kBlocks)
    forward_kernel(const __grid_constant__ Forward<T, Offset, Index> call) {
  using C = Compute<T>;
  using Lanes = Vector<T, kSize>;
  __shared__ PairStage<C, Offset> stages[kWarps];
  auto& stage = stages[threadIdx.x / kWarp];

  const auto& grid = call.grid;
  const auto& partition = call.partition;
  const int32_t lanes = partition.lanes, points = grid.points;
  const Place<Index> place = find_place<kWarps>(partition);
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

  for (int32_t round = 0; round < partition.rounds; ++round) {
    // A lane's vectors are `lanes` vectors apart. Every other four lanes take them in the other order, so that the eight
    // lanes of a quarter of a warp read from different banks.
    const int32_t wanted = round * lanes * kVectors + place.lane;
    const bool writes = place.active && static_cast<int64_t>(wanted) * kSize < call.group_width;
    const int64_t channel = place.group * call.group_width + (writes ? wanted : 0) * kSize;
    int32_t shifts[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      shifts[v] = (v ^ (kVectors > 1 ? threadIdx.x >> 2 & 1 : 0)) * lanes;
    }
    const auto* map = reinterpret_cast<const Lanes*>(call.value.data + place.image * call.value.image_step + channel);
    C total[kVectors][kSize] = {};

    for (int32_t first = 0; first < points; first += kStagedPoints) {
      const int32_t count = points - first < kStagedPoints ? points - first : kStagedPoints;
      stage_pairs(stage, grid, packed, lanes, partition.pairs_per_warp, first, count);
      const Offset* staged = stage.numbers[place.slot];
      for (int32_t point = 0; point < count; ++point) {
        const Point<Offset> numbers{staged[2 * point], staged[2 * point + 1], staged[2 * count + point]};
        const C raw = static_cast<C>(numbers.mask), mask = grid.softmax ? softmax(raw) : raw;
        const auto sample = dcnzoo::place(grid, window_y, window_x, stage.taps[point], numbers, mask);
        const CornerWeights<C> weights(sample);
        const Index corner = sample.y.low * grid.row_step + sample.x.low * grid.column_step;
        const auto add = [&](auto is_interior) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const auto corners = read_corners<decltype(is_interior)::value>(map + shifts[v], corner, sample, grid);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
#pragma unroll
              for (int i = 0; i < kSize; ++i) {
                total[v][i] += weights.weight[c] * static_cast<C>(corners.vector[c].element[i]);
              }
            }
          }
        };
        if (__all_sync(kAllLanes, sample.is_interior())) {
          add(std::true_type{});
        } else {
          add(std::false_type{});
        }
      }
    }

    if (writes) {
      const int64_t pixel = (place.image * call.out_height + place.row) * call.out_width + place.column;
      auto* target = reinterpret_cast<Lanes*>(call.output + pixel * call.channels + channel);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        Lanes out;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          out.element[i] = static_cast<T>(total[v][i]);
        }
        target[shifts[v]] = out;
      }
    }
  }
}

template <typename T, typename Offset, int kSize, int kVectors, typename Index>
void run(
    const DeviceScope& device, const Geometry& geometry, const Tensor& value, const Tensor& offset_mask,
    Tensor& output) {
  const Partition<Index> partition(
      geometry.batch, geometry.out_height, geometry.out_width, geometry.groups, geometry.group_width, kSize * kVectors,
      kWarps);
  const Forward<T, Offset, Index> call{
      value,
      offset_mask,
      static_cast<T*>(output.mutable_data_ptr()),
      static_cast<Index>(geometry.out_height),
      static_cast<Index>(geometry.out_width),
      geometry.channels,
      geometry.group_width,
      Grid<Compute<T>, Index>(geometry, value.stride(1) / kSize, value.stride(2) / kSize),
      partition};
  device.launch(forward_kernel<T, Offset, kSize, kVectors, Index>, partition.blocks, kWarps * kWarp, call);
}

}  // namespace

Tensor dcnv4(
    const Tensor& value, const Tensor& offset_mask, int64_t groups, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
    int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, double offset_scale,
    bool remove_center, bool softmax) {
  const Geometry geometry = check_arguments(
      value, offset_mask, groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
      offset_scale, remove_center, softmax);
  const DeviceScope device({&value, &offset_mask});
  Tensor output = torch::stable::new_empty(
      value, {geometry.batch, geometry.out_height, geometry.out_width, geometry.channels});
  const Tensor offsets = with_contiguous_channels(offset_mask);
  const Tensor map = with_contiguous_channels(value);
  dispatch_types(value.scalar_type(), offset_mask.scalar_type(), [&](auto value_tag, auto offset_tag) {
    using T = typename decltype(value_tag)::type;
    using Offset = typename decltype(offset_tag)::type;
    if (is_vectorizable(geometry, kWide<T>, {&map, &offsets})) {
      // Two vectors to a lane only where every lane has two in every round.
      const int64_t pairs = geometry.group_width / (2 * kWide<T>);
      const bool even = geometry.group_width % (2 * kWide<T>) == 0 && (pairs < kWarp || pairs % kWarp == 0);
      const auto kernel = even ? &run<T, Offset, kWide<T>, 2, int32_t> : &run<T, Offset, kWide<T>, 1, int32_t>;
      kernel(device, geometry, aligned(map), offsets, output);
    } else {
      run<T, Offset, 1, 1, int64_t>(device, geometry, map, offsets, output);
    }
  });
  return output;
}

}  // namespace dcnzoo
