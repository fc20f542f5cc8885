// The gradient of the value map, gathered without atomics. A warp owns a tile of 8 x 8 pixels of one group's channels and
// visits the chunks of 8 x 4 output pixels that have samples there. A chunk's samples form a 64 x 32 matrix, the sum of the
// weights with which each of the chunk's output pixels reads each of the tile's pixels; its product with the chunk's rows
// of grad_output is what the chunk adds to the tile. Half types take the product on the matrix units, with the weights
// split into two bfloat16 terms each (and so grad_output in float16, exactly), summed in float32.
#include "dcnv4_gather.h"

#include "samples.h"

namespace dcnzoo {
namespace {

constexpr int kTileSide = GatherPartition::kTileSide, kTile = kTileSide * kTileSide;
constexpr int kChunkRows = GatherPartition::kChunkRows, kChunkColumns = GatherPartition::kChunkColumns;
constexpr int kTaps = 9;         // sampling points staged at a time
constexpr int kStagePitch = 36;  // these pitches keep shared memory accesses free of bank conflicts
constexpr int kWeightPitch = 40;
constexpr int kGradPitch = 40;

// The pixels that a chunk's samples touch; empty where bottom < top.
struct alignas(16) Extent {
  int32_t top, bottom, left, right;
};

template <typename T, typename Offset, typename Index>
struct Gather {
  Image<const T, Index> grad_output;
  Image<const Offset, Index> offset_mask;
  T* grad_value;  // contiguous
  Extent* extents;  // (N, G, chunks)
  Index out_height, out_width;
  int64_t channels;
  int32_t group_width;
  Index chunks;
  Divisor<Index> groups, chunk_columns, tiles, tile_columns;
  Grid<Compute<T>, Index> grid;
};

template <typename T>
struct Stage {
  T numbers[3 * kTaps][kStagePitch];
  Tap<T> taps[kTaps];
};

// Brings sampling points [first, first + count) of a chunk's 32 pixels to shared memory, eight lanes to a pixel.
template <typename T, typename Offset, typename Index>
__device__ __forceinline__ void stage_points(
    const Gather<T, Offset, Index>& call, int64_t image, Index group, Index chunk_row, Index chunk_column, int32_t first,
    int32_t count, Stage<Compute<T>>& stage) {
  const int32_t lane = threadIdx.x % kWarp, chunk_y = lane / 8, part = lane % 8;
  const int32_t points = call.grid.points;
  const Index row = chunk_row * kChunkRows + chunk_y;
  if (lane < count) {
    stage.taps[lane] = Tap<Compute<T>>(call.grid, first + lane);
  }
  for (int32_t chunk_x = 0; chunk_x < kChunkColumns; ++chunk_x) {
    const Index column = chunk_column * kChunkColumns + chunk_x;
    if (row < call.out_height && column < call.out_width) {
      const Offset* packed = call.offset_mask.at(image, row, column) + group * 3 * points;
      const int32_t pixel = chunk_x * kChunkRows + chunk_y;
      for (int32_t i = part; i < 2 * count; i += 8) {
        stage.numbers[i][pixel] = static_cast<Compute<T>>(packed[2 * first + i]);
      }
      for (int32_t i = part; i < count; i += 8) {
        stage.numbers[2 * kTaps + i][pixel] = static_cast<Compute<T>>(packed[2 * points + first + i]);
      }
    }
  }
}

// Calls visit(sample) for every sample of this lane's pixel of the chunk. All lanes of the warp take part.
template <typename T, typename Offset, typename Index, typename Visit>
__device__ __forceinline__ void visit_samples(
    const Gather<T, Offset, Index>& call, int64_t image, Index group, Index chunk, Stage<Compute<T>>& stage,
    const Visit& visit) {
  using C = Compute<T>;
  const int32_t lane = threadIdx.x % kWarp;
  const Index chunk_row = call.chunk_columns.divide(chunk);
  const Index chunk_column = chunk - chunk_row * call.chunk_columns.divisor;
  const Index row = chunk_row * kChunkRows + lane % kChunkRows;
  const Index column = chunk_column * kChunkColumns + lane / kChunkRows;
  const bool exists = row < call.out_height && column < call.out_width;
  const C window_y = static_cast<C>(row) * call.grid.stride_y + call.grid.origin_y;
  const C window_x = static_cast<C>(column) * call.grid.stride_x + call.grid.origin_x;
  const int32_t points = call.grid.points;
  Softmax<C> softmax{};
  if (call.grid.softmax && exists) {
    softmax = read_softmax<C>(call.offset_mask.at(image, row, column) + group * 3 * points, points);
  }
  for (int32_t first = 0; first < points; first += kTaps) {
    const int32_t count = points - first < kTaps ? points - first : kTaps;
    __syncwarp();
    stage_points(call, image, group, chunk_row, chunk_column, first, count, stage);
    __syncwarp();
    for (int32_t tap = 0; exists && tap < count; ++tap) {
      const Point<C> point{
          stage.numbers[2 * tap][lane], stage.numbers[2 * tap + 1][lane], stage.numbers[2 * kTaps + tap][lane]};
      const C mask = call.grid.softmax ? softmax(point.mask) : point.mask;
      const auto sample = place(call.grid, window_y, window_x, stage.taps[tap], point, mask);
      if (sample.on_map()) {
        visit(sample);
      }
    }
  }
}

constexpr int kExtentWarps = 4;

template <typename T, typename Offset, typename Index>
__global__ void __launch_bounds__(kExtentWarps * kWarp)
    extent_kernel(const __grid_constant__ Gather<T, Offset, Index> call, int64_t total) {
  __shared__ Stage<Compute<T>> stages[kExtentWarps];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kExtentWarps + threadIdx.x / kWarp;
  if (index >= total) {
    return;
  }
  const int64_t plane = index / call.chunks;
  const Index chunk = static_cast<Index>(index - plane * call.chunks);
  const int64_t image = plane / call.groups.divisor;
  const Index group = static_cast<Index>(plane - image * call.groups.divisor);
  Extent extent{static_cast<int32_t>(kInt32Max), -1, static_cast<int32_t>(kInt32Max), -1};
  visit_samples(call, image, group, chunk, stages[threadIdx.x / kWarp], [&](const auto& sample) {
    const auto top = static_cast<int32_t>(sample.y.low_inside ? sample.y.low : sample.y.low + 1);
    const auto bottom = static_cast<int32_t>(sample.y.high_inside ? sample.y.low + 1 : sample.y.low);
    const auto left = static_cast<int32_t>(sample.x.low_inside ? sample.x.low : sample.x.low + 1);
    const auto right = static_cast<int32_t>(sample.x.high_inside ? sample.x.low + 1 : sample.x.low);
    extent.top = top < extent.top ? top : extent.top;
    extent.bottom = bottom > extent.bottom ? bottom : extent.bottom;
    extent.left = left < extent.left ? left : extent.left;
    extent.right = right > extent.right ? right : extent.right;
  });
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const int32_t top = __shfl_xor_sync(kAllLanes, extent.top, lanes);
    const int32_t bottom = __shfl_xor_sync(kAllLanes, extent.bottom, lanes);
    const int32_t left = __shfl_xor_sync(kAllLanes, extent.left, lanes);
    const int32_t right = __shfl_xor_sync(kAllLanes, extent.right, lanes);
    extent.top = top < extent.top ? top : extent.top;
    extent.bottom = bottom > extent.bottom ? bottom : extent.bottom;
    extent.left = left < extent.left ? left : extent.left;
    extent.right = right > extent.right ? right : extent.right;
  }
  if (threadIdx.x % kWarp == 0) {
    call.extents[index] = extent;
  }
}

// A tile's pixels, in the map's coordinates.
template <typename Index>
struct Tile {
  Index top, left;
  int32_t rows, columns;  // fewer than 8 at the map's lower and right edge
};

// The chunk's weights on the tile, one column to a lane: weights[pixel of the tile][pixel of the chunk]. Entries that no
// sample touches are -0, and no others are, so that a grad_output that is not finite can be kept from them.
template <typename T>
using Weights = T[kTile][kWeightPitch];

template <typename T>
__device__ __forceinline__ bool is_touched(T weight) {
  return weight != T(0) || !std::signbit(weight);
}

template <typename T>
__device__ __forceinline__ void clear(Weights<T>& weights) {
  constexpr int kSize = 16 / sizeof(T);
  Vector<T, kSize> nothing;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    nothing.element[i] = T(-0.0);
  }
  auto* vectors = reinterpret_cast<Vector<T, kSize>*>(weights);
  for (int32_t i = threadIdx.x; i < kTile * kWeightPitch / kSize; i += kWarp) {
    vectors[i] = nothing;
  }
}

// Adds a sample's corners to this lane's column; returns a bit for each pair of the tile's rows that was touched.
template <typename T, typename Index>
__device__ __forceinline__ uint32_t add_sample(Weights<T>& weights, const Tile<Index>& tile, const Sample<T, Index>& sample) {
  const auto row = static_cast<int32_t>(sample.y.low - tile.top), column = static_cast<int32_t>(sample.x.low - tile.left);
  const bool rows[2] = {
      sample.y.low_inside && static_cast<uint32_t>(row) < static_cast<uint32_t>(tile.rows),
      sample.y.high_inside && static_cast<uint32_t>(row + 1) < static_cast<uint32_t>(tile.rows)};
  const bool columns[2] = {
      sample.x.low_inside && static_cast<uint32_t>(column) < static_cast<uint32_t>(tile.columns),
      sample.x.high_inside && static_cast<uint32_t>(column + 1) < static_cast<uint32_t>(tile.columns)};
  if (!(rows[0] || rows[1]) || !(columns[0] || columns[1])) {
    return 0;
  }
  const T row_weights[2] = {sample.y.low_weight * sample.mask, sample.y.high_weight * sample.mask};
  const T column_weights[2] = {sample.x.low_weight, sample.x.high_weight};
  T* corner = &weights[0][threadIdx.x % kWarp] + (row * kTileSide + column) * kWeightPitch;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (rows[j] && columns[i]) {
        corner[(j * kTileSide + i) * kWeightPitch] += row_weights[j] * column_weights[i] + T(0);  // never -0
      }
    }
  }
  return (rows[0] ? 1u << (row / 2) : 0u) | (rows[1] ? 1u << ((row + 1) / 2) : 0u);
}

template <typename T>
__device__ __forceinline__ bool is_ordinary(T number) {
  return number < T(1e37) && number > T(-1e37);
}

// Sums of the half types, on the matrix units. Lane l holds, of each block of 16 pixels and 8 channels, those of pixels
// l / 4 and l / 4 + 8 and channels 2 * (l % 4) and the next.
template <typename T>
struct MatrixSums {
  static constexpr int kChannels = 32;
  static constexpr int kTiles = kChannels / 8;
  static constexpr int kParts = std::is_same_v<T, Half> ? 2 : 1;  // grad_output as a sum of bfloat16 numbers

  struct Shared {
    BFloat16 grad[kParts][kChannels][kGradPitch];
  };
  float sum[kTile / 16][kTiles][4] = {};

  __device__ __forceinline__ static void put(Shared& shared, int32_t pixel, int32_t channel, T grad) {
    const auto number = static_cast<float>(grad);
    shared.grad[0][channel][pixel] = BFloat16(number);
    if constexpr (kParts == 2) {
      const float rest = number - static_cast<float>(shared.grad[0][channel][pixel]);
      shared.grad[1][channel][pixel] = BFloat16(rest == rest ? rest : 0.0f);
    }
  }

  __device__ __forceinline__ static float get(const Shared& shared, int32_t pixel, int32_t channel) {
    float grad = static_cast<float>(shared.grad[0][channel][pixel]);
    if constexpr (kParts == 2) {
      grad += static_cast<float>(shared.grad[1][channel][pixel]);
    }
    return grad;
  }

  __device__ __forceinline__ static uint32_t pair(const BFloat16* numbers) {
    return *reinterpret_cast<const uint32_t*>(numbers);
  }

  __device__ __forceinline__ void add(
      const Weights<float>& weights, const Shared& shared, uint32_t touched, int32_t channels) {
    const int32_t lane = threadIdx.x % kWarp, line = lane / 4, step = lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < kWarp; k += 16) {
      uint32_t grad[kParts][kTiles][2];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if (n * 8 < channels) {
            const BFloat16* numbers = shared.grad[part][n * 8 + line];
            grad[part][n][0] = pair(numbers + k + step);
            grad[part][n][1] = pair(numbers + k + step + 8);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kTile / 16; ++m) {
        if (touched >> m & 1) {
          uint32_t high[4], low[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* two = &weights[m * 16 + line + i % 2 * 8][k + step + i / 2 * 8];
            split(*reinterpret_cast<const Vector<float, 2>*>(two), high[i], low[i]);
          }
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            if (n * 8 < channels) {
              multiply_add(sum[m][n], high, grad[0][n]);
              multiply_add(sum[m][n], low, grad[0][n]);
              if constexpr (kParts == 2) {
                multiply_add(sum[m][n], high, grad[1][n]);
              }
            }
          }
        }
      }
    }
  }

  // Calls visit(pixel, channel, sum) for all sums of this lane.
  template <typename Visit>
  __device__ __forceinline__ void visit(const Visit& visit) {
    const int32_t lane = threadIdx.x % kWarp;
#pragma unroll
    for (int m = 0; m < kTile / 16; ++m) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit(m * 16 + lane / 4 + i / 2 * 8, n * 8 + lane % 4 * 2 + i % 2, sum[m][n][i]);
        }
      }
    }
  }
};

// Sums of any type by plain arithmetic: a lane holds one of 16 channels of half of the tile's pixels.
template <typename T>
struct PlainSums {
  using C = Compute<T>;
  static constexpr int kChannels = 16;
  static constexpr int kPixels = kTile / 2;

  struct Shared {
    C grad[kWarp][kChannels];
  };
  C sum[kPixels] = {};

  __device__ __forceinline__ static void put(Shared& shared, int32_t pixel, int32_t channel, T grad) {
    shared.grad[pixel][channel] = static_cast<C>(grad);
  }

  __device__ __forceinline__ static C get(const Shared& shared, int32_t pixel, int32_t channel) {
    return shared.grad[pixel][channel];
  }

  __device__ __forceinline__ void add(const Weights<C>& weights, const Shared& shared, uint32_t touched, int32_t) {
    constexpr int kSize = 16 / sizeof(C);
    const int32_t channel = threadIdx.x % kChannels, first = threadIdx.x % kWarp / kChannels * kPixels;
    for (int32_t k = 0; k < kWarp; k += kSize) {
      C grad[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        grad[i] = shared.grad[k + i][channel];
      }
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        const auto row = *reinterpret_cast<const Vector<C, kSize>*>(&weights[first + p][k]);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sum[p] += row.element[i] * grad[i];
        }
      }
    }
  }

  template <typename Visit>
  __device__ __forceinline__ void visit(const Visit& visit) {
    const int32_t channel = threadIdx.x % kChannels, first = threadIdx.x % kWarp / kChannels * kPixels;
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      visit(first + p, channel, sum[p]);
    }
  }
};

template <typename T, typename Offset, int kSize, typename Index>
__global__ void __launch_bounds__(kWarp) gather_kernel(const __grid_constant__ Gather<T, Offset, Index> call) {
  using C = Compute<T>;
  using Sums = std::conditional_t<kHasMatrixUnit && sizeof(T) == 2, MatrixSums<T>, PlainSums<T>>;
  __shared__ Stage<C> stage;
  alignas(16) __shared__ Weights<C> weights;
  __shared__ typename Sums::Shared shared;

  const int32_t lane = threadIdx.x;
  const Index block = static_cast<Index>(blockIdx.x);
  const Index place = call.groups.divide(block);
  const Index group = block - place * call.groups.divisor;
  const Index image = call.tiles.divide(place);
  const Index tile_index = place - image * call.tiles.divisor;
  const Index tile_row = call.tile_columns.divide(tile_index);
  const Index height = call.grid.height, width = call.grid.width;
  Tile<Index> tile;
  tile.top = tile_row * kTileSide;
  tile.left = (tile_index - tile_row * call.tile_columns.divisor) * kTileSide;
  tile.rows = static_cast<int32_t>(height - tile.top < kTileSide ? height - tile.top : kTileSide);
  tile.columns = static_cast<int32_t>(width - tile.left < kTileSide ? width - tile.left : kTileSide);
  const Extent* extents = call.extents + (static_cast<int64_t>(image) * call.groups.divisor + group) * call.chunks;

  for (int32_t first_channel = 0; first_channel < call.group_width; first_channel += Sums::kChannels) {
    const int32_t rest = call.group_width - first_channel;
    const int32_t channels = rest < Sums::kChannels ? rest : Sums::kChannels;
    const int64_t map_channel = static_cast<int64_t>(group) * call.group_width + first_channel;
    Sums sums;

    const auto add_chunk = [&](Index chunk) {
      __syncwarp();
      clear(weights);
      uint32_t touched = 0;
      C probe = 0;
      visit_samples(call, image, group, chunk, stage, [&](const auto& sample) {
        touched |= add_sample(weights, tile, sample);
        probe += sample.mask < C(0) ? -sample.mask : sample.mask;
      });
      uint32_t all_touched = 0;
#pragma unroll
      for (int m = 0; m < kTile / 16; ++m) {
        all_touched |= __ballot_sync(kAllLanes, touched >> m & 1) != 0 ? 1u << m : 0u;
      }
      if (all_touched == 0) {
        return;
      }

      const Index chunk_row = call.chunk_columns.divide(chunk);
      const Index row = chunk_row * kChunkRows;
      const Index column = (chunk - chunk_row * call.chunk_columns.divisor) * kChunkColumns;
      const Index y = row + lane % kChunkRows, x = column + lane / kChunkRows;
      const bool exists = y < call.out_height && x < call.out_width;
      for (int32_t channel = 0; channel < channels; channel += kSize) {
        Vector<T, kSize> grads{};
        if (exists) {
          grads = *reinterpret_cast<const Vector<T, kSize>*>(call.grad_output.at(image, y, x) + map_channel + channel);
        }
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          probe += static_cast<C>(grads.element[i]) * C(0);  // not a number where grad_output is not finite
          Sums::put(shared, lane, channel + i, grads.element[i]);
        }
      }
      __syncwarp();
      if (__all_sync(kAllLanes, is_ordinary(probe))) {
        sums.add(weights, shared, all_touched, channels);
        return;
      }
      // Infinities and the like must not meet the weights of pixels that they do not touch.
#pragma unroll 1
      for (int32_t k = 0; k < kWarp; ++k) {
        sums.visit([&](int32_t pixel, int32_t channel, C& sum) {
          const C weight = weights[pixel][k];
          if (is_touched(weight)) {
            sum += weight * Sums::get(shared, k, channel);
          }
        });
      }
    };

    for (Index first = 0; first < call.chunks; first += kWarp) {
      bool overlaps = false;
      if (first + lane < call.chunks) {
        const Extent extent = extents[first + lane];
        overlaps = extent.top < tile.top + tile.rows && extent.bottom >= tile.top &&
                   extent.left < tile.left + tile.columns && extent.right >= tile.left;
      }
      for (uint32_t rest = __ballot_sync(kAllLanes, overlaps); rest != 0; rest &= rest - 1) {
        add_chunk(first + __ffs(static_cast<int>(rest)) - 1);
      }
    }

    sums.visit([&](int32_t pixel, int32_t channel, C sum) {
      const int32_t y = pixel / kTileSide, x = pixel % kTileSide;
      if (y < tile.rows && x < tile.columns && channel < channels) {
        const int64_t target = (static_cast<int64_t>(image) * height + tile.top + y) * width + tile.left + x;
        call.grad_value[target * call.channels + map_channel + channel] = static_cast<T>(sum);
      }
    });
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, typename Offset, int kSize, typename Index>
void run(
    const DeviceScope& device, const Geometry& geometry, const Tensor& grad_output, const Tensor& offset_mask,
    Tensor& grad_value) {
  const GatherPartition partition(geometry.height, geometry.width, geometry.out_height, geometry.out_width);
  const int64_t planes = geometry.batch * geometry.groups;
  Tensor extents = torch::stable::new_empty(offset_mask, {planes * partition.chunks, 4}, ScalarType::Int);
  const Gather<T, Offset, Index> call{
      grad_output,
      offset_mask,
      static_cast<T*>(grad_value.mutable_data_ptr()),
      static_cast<Extent*>(extents.mutable_data_ptr()),
      static_cast<Index>(geometry.out_height),
      static_cast<Index>(geometry.out_width),
      geometry.channels,
      static_cast<int32_t>(geometry.group_width),
      static_cast<Index>(partition.chunks),
      Divisor<Index>(geometry.groups),
      Divisor<Index>(partition.chunk_columns),
      Divisor<Index>(partition.tiles),
      Divisor<Index>(partition.tile_columns),
      Grid<Compute<T>, Index>(geometry, 0, 0)};
  device.launch(
      extent_kernel<T, Offset, Index>, divide_up(planes * partition.chunks, kExtentWarps), kExtentWarps * kWarp, call,
      planes * partition.chunks);
  device.launch(gather_kernel<T, Offset, kSize, Index>, planes * partition.tiles, kWarp, call);
}

}  // namespace

void gather_grad_value(
    const DeviceScope& device, const Geometry& geometry, const Tensor& grad_output, const Tensor& offset_mask,
    Tensor& grad_value, bool wide) {
  dispatch_types(grad_output.scalar_type(), offset_mask.scalar_type(), [&](auto value_tag, auto offset_tag) {
    using T = typename decltype(value_tag)::type;
    using Offset = typename decltype(offset_tag)::type;
    const auto kernel = wide ? &run<T, Offset, kWide<T>, int32_t> : &run<T, Offset, 1, int64_t>;
    kernel(device, geometry, grad_output, offset_mask, grad_value);
  });
}

}  // namespace dcnzoo
