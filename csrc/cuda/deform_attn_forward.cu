// Multi-scale deformable attention on CUDA, forward.
#include "attention.h"

namespace dcnzoo {
namespace {

constexpr int kBlocks = 5;  // per multiprocessor at least, which bounds the registers

template <typename T, typename Offset, int kSize, typename Index>
__global__ void __launch_bounds__(kAttentionWarps * kWarp, kBlocks)
    attention_kernel(const __grid_constant__ AttentionCall<T, Offset, Index> call, T* output) {
  using C = Compute<T>;
  using Lanes = Vector<T, kSize>;
  __shared__ SampleRecord<C, Index> shared_records[kAttentionWarps][2][kWarp];
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto& partition = call.partition;
  const int32_t lanes = partition.lanes;
  const Place<Index> place = find_place<kAttentionWarps>(partition);
  if (!place.warp_active) {
    return;
  }
  const int64_t pair = (place.image * call.queries + place.column) * call.heads + place.group;
  const T* head = call.value + place.image * call.image_step + place.group * call.head_step;

  for (int32_t round = 0; round < partition.rounds; ++round) {
    const int32_t wanted = (round * lanes + place.lane) * kSize;
    const bool writes = place.active && wanted < call.depth;
    const int32_t channel = wanted < call.depth ? wanted : 0;
    const auto* map = reinterpret_cast<const Lanes*>(head + channel);
    C total[kSize] = {};
    int buffer = 0;
    for (int32_t first = 0; first < call.samples; first += lanes, buffer ^= 1) {
      if (first + place.lane < call.samples) {
        shared_records[warp][buffer][lane] =
            SampleRecord<C, Index>(place_sample<C>(call, pair, first + place.lane));
      }
      __syncwarp();
      const auto* records = shared_records[warp][buffer] + place.first_lane;
      const int32_t count = call.samples - first < lanes ? call.samples - first : lanes;
#pragma unroll 2
      for (int32_t i = 0; i < count; ++i) {
        const SampleRecord<C, Index> record = records[i];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const Lanes vector = read_corner(map, call.pixel_step, record, c);
#pragma unroll
          for (int k = 0; k < kSize; ++k) {
            total[k] += record.weight[c] * static_cast<C>(vector.element[k]);
          }
        }
      }
    }
    __syncwarp();  // the next round writes the buffers again
    if (writes) {
      Lanes out;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        out.element[k] = static_cast<T>(total[k]);
      }
      *reinterpret_cast<Lanes*>(output + pair * call.depth + channel) = out;
    }
  }
}

template <typename T, typename Offset, int kSize, typename Index>
void run(const DeviceScope& device, const Attention& sizes, const AttentionTensors& tensors, Tensor& output) {
  const AttentionCall<T, Offset, Index> call(sizes, tensors.value, tensors.locations, tensors.weights, kSize);
  device.launch(
      attention_kernel<T, Offset, kSize, Index>, call.partition.blocks, kAttentionWarps * kWarp, call,
      static_cast<T*>(output.mutable_data_ptr()));
}

}  // namespace

Tensor deform_attn(
    const Tensor& value, const Tensor& sampling_locations, const Tensor& attention_weights,
    const std::vector<int64_t>& spatial_shapes) {
  const Attention sizes = check_attention(value, sampling_locations, attention_weights, spatial_shapes);
  const DeviceScope device({&value, &sampling_locations, &attention_weights});
  Tensor output = torch::stable::new_empty(value, {sizes.batch, sizes.queries, sizes.heads * sizes.depth});
  if (sizes.batch * sizes.queries == 0) {
    return output;
  }
  dispatch_types(value.scalar_type(), sampling_locations.scalar_type(), [&](auto value_tag, auto other_tag) {
    using T = typename decltype(value_tag)::type;
    using Offset = typename decltype(other_tag)::type;
    const AttentionTensors tensors(sizes, value, sampling_locations, attention_weights, kWide<T>);
    const auto kernel = tensors.wide ? &run<T, Offset, kWide<T>, int32_t> : &run<T, Offset, 1, int64_t>;
    kernel(device, sizes, tensors, output);
  });
  return output;
}

}  // namespace dcnzoo
