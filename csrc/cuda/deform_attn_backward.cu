// Multi-scale deformable attention on CUDA, backward. A lane multiplies the output's gradient with the four corners of every
// sample; the pair's lanes add up these dots in shared memory, and the lane that placed the sample turns them into the
// gradients of its location and weight. The gradient of the value maps is scattered in float32 by vector reductions; in a
// fixed order, by a kernel of its own whose warps each own a head's channels of a range of pixels.
#include "attention.h"

#include <algorithm>

namespace dcnzoo {
namespace {

constexpr int kBlocks = 4;  // per multiprocessor at least, which bounds the registers
constexpr int kDots = 4;  // samples whose dots are added up at a time

template <typename T>
struct alignas(16) Dots {
  T corner[4];
};

template <typename T, typename Offset>
struct Gradients {
  const T* output;       // contiguous
  Compute<T>* value;     // contiguous and zero at first
  Offset *locations, *weights;
};

template <typename T, typename Offset, int kSize, typename Index, bool kScatter>
__global__ void __launch_bounds__(kAttentionWarps * kWarp, kBlocks) attention_backward_kernel(
    const __grid_constant__ AttentionCall<T, Offset, Index> call, const __grid_constant__ Gradients<T, Offset> gradients) {
  using C = Compute<T>;
  using Lanes = Vector<T, kSize>;
  __shared__ SampleRecord<C, Index> shared_records[kAttentionWarps][2][kWarp];
  __shared__ Dots<C> shared_dots[kAttentionWarps][kDots][kWarp + 1];
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  auto& dots = shared_dots[warp];
  const int32_t lanes = call.partition.lanes;
  const Place<Index> place = find_place<kAttentionWarps>(call.partition);
  if (!place.warp_active) {
    return;
  }
  const int64_t pair = (place.image * call.queries + place.column) * call.heads + place.group;
  const T* head = call.value + place.image * call.image_step + place.group * call.head_step;
  const T* grads = gradients.output + pair * call.depth;
  C* grad_head = gradients.value + (place.image * call.pixels * call.heads + place.group) * call.depth;

  int buffer = 0;
  for (int32_t first = 0; first < call.samples; first += lanes, buffer ^= 1) {
    const int32_t own = first + place.lane;
    LevelSample<C, Index> placed{};
    if (own < call.samples) {
      placed = place_sample<C>(call, pair, own);
      shared_records[warp][buffer][lane] = SampleRecord<C, Index>(placed);
    }
    __syncwarp();
    const auto* records = shared_records[warp][buffer] + place.first_lane;
    const int32_t count = call.samples - first < lanes ? call.samples - first : lanes;
    Dots<C> sum{};
    for (int32_t begin = 0; begin < count; begin += kDots) {
      const int32_t end = begin + kDots < count ? begin + kDots : count;
      for (int32_t i = begin; i < end; ++i) {
        const SampleRecord<C, Index> record = records[i];
        Dots<C> dot{};
        for (int32_t round = 0; round < call.partition.rounds; ++round) {
          const int32_t channel = (round * lanes + place.lane) * kSize;
          if (channel >= call.depth) {
            break;
          }
          const Lanes grad_vector = *reinterpret_cast<const Lanes*>(grads + channel);
          const auto* map = reinterpret_cast<const Lanes*>(head + channel);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if (!record.has_corner(c)) {
              continue;
            }
            const Lanes vector = read_corner(map, call.pixel_step, record, c);
            C term[kSize];
#pragma unroll
            for (int k = 0; k < kSize; ++k) {
              const C grad = static_cast<C>(grad_vector.element[k]);
              dot.corner[c] += grad * static_cast<C>(vector.element[k]);
              term[k] = record.weight[c] * grad;
            }
            if (kScatter && place.active) {
              add_to(grad_head + record.corner_pixel(c) * call.heads * call.depth + channel, term);
            }
          }
        }
        dots[i - begin][lane] = dot;
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
    if (own < call.samples && place.active) {
      const auto& sample = placed.sample;
      PointGradient<C> gradient{};
      if (sample.on_map()) {
        gradient = point_gradient(sample.y, sample.x, sample.mask, sum.corner);
      }
      const int64_t index = pair * call.samples + own;
      gradients.locations[2 * index] = static_cast<Offset>(gradient.dx * static_cast<C>(placed.level.width));
      gradients.locations[2 * index + 1] = static_cast<Offset>(gradient.dy * static_cast<C>(placed.level.height));
      gradients.weights[index] = static_cast<Offset>(gradient.mask);
    }
  }
}

// Adds to the gradient of the value maps in the order of the queries. A warp owns one head's channels of the pixels
// [first, last) of an image; its lanes place 32 samples at a time, and all of them add those that fall into its range.
template <typename T, typename Offset, typename Index>
__global__ void __launch_bounds__(kWarp) attention_ordered_kernel(
    const __grid_constant__ AttentionCall<T, Offset, Index> call, const __grid_constant__ Gradients<T, Offset> gradients,
    int64_t bands) {
  using C = Compute<T>;
  __shared__ SampleRecord<C, Index> records[kWarp];
  const int32_t lane = threadIdx.x;
  const int64_t plane = blockIdx.x / bands, band = blockIdx.x % bands;
  const int64_t image = plane / call.heads, head = plane % call.heads;
  const int64_t first = call.pixels * band / bands, last = call.pixels * (band + 1) / bands;
  C* grad_head = gradients.value + (image * call.pixels * call.heads + head) * call.depth;
  const int64_t total = call.queries * call.samples;

  for (int64_t begin = 0; begin < total; begin += kWarp) {
    const int64_t own = begin + lane;
    bool touches = false;
    if (own < total) {
      const int64_t pair = (image * call.queries + own / call.samples) * call.heads + head;
      const SampleRecord<C, Index> record(place_sample<C>(call, pair, static_cast<int32_t>(own % call.samples)));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int64_t pixel = record.corner_pixel(c);
        touches |= record.has_corner(c) && pixel >= first && pixel < last;
      }
      records[lane] = record;
    }
    uint32_t left = __ballot_sync(kAllLanes, touches);
    __syncwarp();
    while (left != 0) {
      const int32_t i = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      const SampleRecord<C, Index> record = records[i];
      const int64_t query = image * call.queries + (begin + i) / call.samples;
      const T* grads = gradients.output + (query * call.heads + head) * call.depth;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int64_t pixel = record.corner_pixel(c);
        if (record.has_corner(c) && pixel >= first && pixel < last) {
          for (int64_t channel = lane; channel < call.depth; channel += kWarp) {
            grad_head[pixel * call.heads * call.depth + channel] += record.weight[c] * static_cast<C>(grads[channel]);
          }
        }
      }
    }
    __syncwarp();
  }
}

template <typename T, typename Offset, int kSize, typename Index, bool kScatter>
void run(
    const DeviceScope& device, const Attention& sizes, const AttentionTensors& tensors,
    const Gradients<T, Offset>& gradients) {
  const AttentionCall<T, Offset, Index> call(sizes, tensors.value, tensors.locations, tensors.weights, kSize);
  device.launch(
      attention_backward_kernel<T, Offset, kSize, Index, kScatter>, call.partition.blocks, kAttentionWarps * kWarp, call,
      gradients);
  if (!kScatter) {
    constexpr int64_t kWarps = 4096;  // about, for any GPU to have enough of them
    const int64_t planes = sizes.batch * sizes.heads;
    const int64_t bands = std::max<int64_t>(1, std::min(sizes.pixels, kWarps / planes));
    device.launch(attention_ordered_kernel<T, Offset, Index>, planes * bands, kWarp, call, gradients, bands);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> deform_attn_backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& sampling_locations, const Tensor& attention_weights,
    const std::vector<int64_t>& spatial_shapes, bool deterministic) {
  const Attention sizes = check_attention(value, sampling_locations, attention_weights, spatial_shapes);
  check_attention_gradient(grad_output, value, sizes);
  const DeviceScope device({&value, &sampling_locations, &attention_weights, &grad_output});
  Tensor grad_value = value;
  Tensor grad_locations = torch::stable::new_empty(sampling_locations, sampling_locations.sizes());
  Tensor grad_weights = torch::stable::new_empty(attention_weights, attention_weights.sizes());
  dispatch_types(value.scalar_type(), sampling_locations.scalar_type(), [&](auto value_tag, auto other_tag) {
    using T = typename decltype(value_tag)::type;
    using Offset = typename decltype(other_tag)::type;
    constexpr ScalarType kCompute = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
    grad_value = torch::stable::new_zeros(value, value.sizes(), kCompute);
    if (sizes.batch * sizes.queries > 0) {
      const AttentionTensors tensors(sizes, value, sampling_locations, attention_weights, kWide<T>);
      Tensor grads = torch::stable::contiguous(grad_output);
      if (tensors.wide && reinterpret_cast<uintptr_t>(grads.const_data_ptr()) % 16 != 0) {
        grads = torch::stable::clone(grads);
      }
      const Gradients<T, Offset> gradients{
          static_cast<const T*>(grads.const_data_ptr()), static_cast<Compute<T>*>(grad_value.mutable_data_ptr()),
          static_cast<Offset*>(grad_locations.mutable_data_ptr()), static_cast<Offset*>(grad_weights.mutable_data_ptr())};
      const auto run_kernel = [&](auto scatters) {
        constexpr bool kScatter = decltype(scatters)::value;
        const auto kernel =
            tensors.wide ? &run<T, Offset, kWide<T>, int32_t, kScatter> : &run<T, Offset, 1, int64_t, kScatter>;
        kernel(device, sizes, tensors, gradients);
      };
      if (deterministic) {
        run_kernel(std::false_type{});
      } else {
        run_kernel(std::true_type{});
      }
    }
    if (!std::is_same_v<T, Compute<T>>) {
      grad_value = torch::stable::to(grad_value, value.scalar_type());
    }
  });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace dcnzoo
