// DCNv4 backward on CUDA. As in the forward a lane owns one 16-byte vector of channels of a pair. It multiplies the
// output's gradient with the four corners of every sample; the pair's lanes add up these dots in shared memory, and the
// lane that placed the sample turns them into the gradients of its offsets and modulation scalar. The gradient of the
// value map is scattered in float32 by vector reductions, or gathered in a fixed order by dcnv4_gather.cu.
#include "../dcnv4.h"

#include "backward.h"
#include "dcnv4_gather.h"
#include "samples.h"
#include "tensors.h"

namespace dcnzoo {
namespace {

constexpr int kWarps = 4;

// Blocks per multiprocessor at least, which bounds the registers.
template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 3 : 4;
constexpr int kDots = 4;  // samples whose dots are added up at a time

template <typename T, typename Offset, typename Index>
struct Backward {
  Image<const T, Index> grad_output, value;
  Image<const Offset, Index> offset_mask;
  Compute<T>* grad_value;    // contiguous and zero at first; null where it is computed elsewhere
  Offset* grad_offset_mask;  // contiguous
  Index out_height, out_width;
  int64_t channels, group_width, offset_mask_size;
  Grid<Compute<T>, Index> grid;
  Partition<Index> partition;
};

template <typename T>
struct alignas(16) Dots {
  T corner[4];
};

template <typename T, typename Offset, int kSize, typename Index, bool kScatter>
__global__ void __launch_bounds__(kWarps * kWarp, kBlocks<T>)
    backward_kernel(const __grid_constant__ Backward<T, Offset, Index> call) {
  using C = Compute<T>;
  using Lanes = Vector<T, kSize>;
  __shared__ Record<C, Index> shared_records[kWarps][2][kWarp];
  __shared__ Index shared_pixels[kWarps][2][kWarp];
  __shared__ Dots<C> shared_dots[kWarps][kDots][kWarp + 1];
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  auto& dots = shared_dots[warp];

  const auto& grid = call.grid;
  const int32_t lanes = call.partition.lanes, points = grid.points;
  const Place<Index> place = find_place<kWarps>(call.partition);
  if (!place.warp_active) {
    return;
  }
  const Offset* packed = call.offset_mask.at(place.image, place.row, place.column) + place.group * 3 * points;
  const int64_t pixel = (place.image * call.out_height + place.row) * call.out_width + place.column;
  Offset* grad_packed = call.grad_offset_mask + pixel * call.offset_mask_size + place.group * 3 * points;
  const C window_y = static_cast<C>(place.row) * grid.stride_y + grid.origin_y;
  const C window_x = static_cast<C>(place.column) * grid.stride_x + grid.origin_x;
  Softmax<C> softmax{};
  if (grid.softmax) {
    softmax = read_softmax<C>(packed, points);
  }
  const int64_t first_channel = place.group * call.group_width;
  const T* grads = call.grad_output.at(place.image, place.row, place.column) + first_channel;
  const T* map = call.value.data + place.image * call.value.image_step + first_channel;
  C* grad_map = call.grad_value;
  if (kScatter) {
    grad_map += place.image * grid.height * grid.width * call.channels + first_channel;
  }
  const Index map_channels = static_cast<Index>(call.channels);

  // Under softmax a first pass finds the sum that all of a pair's scalars have in common.
  C common = 0;
  for (int pass = grid.softmax ? 0 : 1; pass < 2; ++pass) {
    C own_common = 0;
    PointReader<Offset> reader(packed, place.lane, lanes, points);
    Point<Offset> next{};
    if (place.lane < points) {
      next = reader.next();
    }
    int buffer = 0;
    for (int32_t first = 0; first < points; first += lanes, buffer ^= 1) {
      const int32_t own = first + place.lane;
      C mask = 0;
      Sample<C, Index> sample{};
      bool interior = true;
      if (own < points) {
        const C raw = static_cast<C>(next.mask);
        mask = grid.softmax ? softmax(raw) : raw;
        sample = dcnzoo::place(grid, window_y, window_x, Tap<C>(grid, own), next, mask);
        interior = sample.is_interior();
        shared_records[warp][buffer][lane] = Record<C, Index>(sample, grid);
        if (kScatter) {
          shared_pixels[warp][buffer][lane] = sample.y.low * grid.width + sample.x.low;
        }
      }
      if (own + lanes < points) {
        next = reader.next();
      }
      __syncwarp();

      const auto* records = shared_records[warp][buffer] + place.first_lane;
      const auto* pixels = shared_pixels[warp][buffer] + place.first_lane;
      const int32_t count = points - first < lanes ? points - first : lanes;
      const bool all_interior = __all_sync(kAllLanes, interior);
      Dots<C> sum{};
      for (int32_t begin = 0; begin < count; begin += kDots) {
        const int32_t end = begin + kDots < count ? begin + kDots : count;
        const auto multiply = [&](auto is_interior) {
          constexpr bool kInterior = decltype(is_interior)::value;
          for (int32_t point = begin; point < end; ++point) {
            const Record<C, Index> record = records[point];
            Dots<C> dot{};
            for (int32_t round = 0; round < call.partition.rounds; ++round) {
              const int32_t channel = (round * lanes + place.lane) * kSize;
              if (channel >= call.group_width) {
                break;
              }
              const Lanes grad_vector = *reinterpret_cast<const Lanes*>(grads + channel);
              const auto corners =
                  read_corners<kInterior>(reinterpret_cast<const Lanes*>(map + channel), record.place(), record, grid);
              C grad[kSize];
#pragma unroll
              for (int i = 0; i < kSize; ++i) {
                grad[i] = static_cast<C>(grad_vector.element[i]);
              }
#pragma unroll
              for (int c = 0; c < 4; ++c) {
#pragma unroll
                for (int i = 0; i < kSize; ++i) {
                  dot.corner[c] += grad[i] * static_cast<C>(corners.vector[c].element[i]);
                }
              }
              if (kScatter && pass == 1 && place.active) {
                const CornerWeights<C> weights(record);
                const Index steps[4] = {0, 1, grid.width, static_cast<Index>(grid.width + 1)};
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                  if (kInterior || record.has_corner(c)) {
                    C term[kSize];
#pragma unroll
                    for (int i = 0; i < kSize; ++i) {
                      term[i] = weights.weight[c] * grad[i];
                    }
                    add_to(grad_map + (pixels[point] + steps[c]) * map_channels + channel, term);
                  }
                }
              }
            }
            dots[point - begin][lane] = dot;
          }
        };
        if (all_interior) {
          multiply(std::true_type{});
        } else {
          multiply(std::false_type{});
        }
        __syncwarp();
        if (place.lane >= begin && place.lane < end) {
          for (int32_t i = 0; i < lanes; ++i) {
            const Dots<C> dot = dots[place.lane - begin][place.first_lane + i];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              sum.corner[c] += dot.corner[c];
            }
          }
        }
        __syncwarp();
      }

      if (own < points) {
        PointGradient<C> gradient{};
        if (sample.on_map()) {
          gradient = point_gradient(sample.y, sample.x, sample.mask * grid.scale, sum.corner);
        }
        if (grid.softmax) {
          own_common += mask * gradient.mask;
          gradient.mask = mask * (gradient.mask - common);
        }
        if (pass == 1 && place.active) {
          grad_packed[2 * own] = static_cast<Offset>(gradient.dx);
          grad_packed[2 * own + 1] = static_cast<Offset>(gradient.dy);
          grad_packed[2 * points + own] = static_cast<Offset>(gradient.mask);
        }
      }
    }
    if (pass == 0) {
      dots[0][lane].corner[0] = own_common;
      __syncwarp();
      for (int32_t i = 0; i < lanes; ++i) {
        common += dots[0][place.first_lane + i].corner[0];
      }
      __syncwarp();
    }
  }

  // What lies behind the last group has no gradient.
  const Index groups = static_cast<Index>(call.channels / call.group_width);
  if (place.active && place.group == groups - 1) {
    for (int64_t i = 3 * points + place.lane; i < call.offset_mask_size - place.group * 3 * points; i += lanes) {
      grad_packed[i] = Offset(0);
    }
  }
}

template <typename T, typename Offset, int kSize, typename Index, bool kScatter>
void run(
    const DeviceScope& device, const Geometry& geometry, const Tensor& grad_output, const Tensor& value,
    const Tensor& offset_mask, Tensor* grad_value, Tensor& grad_offset_mask) {
  const Partition<Index> partition(
      geometry.batch, geometry.out_height, geometry.out_width, geometry.groups, geometry.group_width, kSize, kWarps);
  const Backward<T, Offset, Index> call{
      grad_output,
      value,
      offset_mask,
      kScatter ? static_cast<Compute<T>*>(grad_value->mutable_data_ptr()) : nullptr,
      static_cast<Offset*>(grad_offset_mask.mutable_data_ptr()),
      static_cast<Index>(geometry.out_height),
      static_cast<Index>(geometry.out_width),
      geometry.channels,
      geometry.group_width,
      geometry.offset_mask_size,
      Grid<Compute<T>, Index>(geometry, value.stride(1) / kSize, value.stride(2) / kSize),
      partition};
  device.launch(
      backward_kernel<T, Offset, kSize, Index, kScatter>, partition.blocks, kWarps * kWarp, call);
}

}  // namespace

std::tuple<Tensor, Tensor> dcnv4_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& offset_mask, int64_t groups, int64_t kernel_h,
    int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
    int64_t dilation_w, double offset_scale, bool remove_center, bool softmax, bool deterministic) {
  const Geometry geometry = check_arguments(
      value, offset_mask, groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
      offset_scale, remove_center, softmax);
  check_grad_output(grad_output, value, geometry);
  const DeviceScope device({&value, &offset_mask, &grad_output});
  const Tensor grads = with_contiguous_channels(grad_output), map = with_contiguous_channels(value);
  const Tensor offsets = with_contiguous_channels(offset_mask);
  Tensor grad_offset_mask = torch::stable::new_empty(offset_mask, offset_mask.sizes());
  Tensor grad_value = value;
  dispatch_types(value.scalar_type(), offset_mask.scalar_type(), [&](auto value_tag, auto offset_tag) {
    using T = typename decltype(value_tag)::type;
    using Offset = typename decltype(offset_tag)::type;
    constexpr ScalarType kCompute = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
    const bool wide = is_vectorizable(geometry, kWide<T>, {&grads, &map, &offsets});
    const Tensor wide_grads = wide ? aligned(grads) : grads, wide_map = wide ? aligned(map) : map;
    const GatherPartition gather(geometry.height, geometry.width, geometry.out_height, geometry.out_width);
    const bool gathers = deterministic || gather.is_preferable(geometry.group_width);
    grad_value = gathers ? torch::stable::new_empty(value, value.sizes())
                         : torch::stable::new_zeros(value, value.sizes(), kCompute);
    const auto run_kernel = [&](auto scatters) {
      constexpr bool kScatter = decltype(scatters)::value;
      const auto kernel = wide ? &run<T, Offset, kWide<T>, int32_t, kScatter> : &run<T, Offset, 1, int64_t, kScatter>;
      kernel(device, geometry, wide_grads, wide_map, offsets, &grad_value, grad_offset_mask);
    };
    if (gathers) {
      run_kernel(std::false_type{});
      gather_grad_value(device, geometry, wide_grads, offsets, grad_value, wide);
    } else {
      run_kernel(std::true_type{});
      if (!std::is_same_v<T, Compute<T>>) {
        grad_value = torch::stable::to(grad_value, value.scalar_type());
      }
    }
  });
  return {grad_value, grad_offset_mask};
}

}  // namespace dcnzoo
