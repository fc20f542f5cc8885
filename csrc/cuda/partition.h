// How the work of one call is dealt out to blocks, warps and lanes: plain host arithmetic, without any CUDA header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define DCNZOO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DCNZOO_HOST_DEVICE inline
#endif

namespace dcnzoo {

constexpr int kWarp = 32;
constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

// Division by a number known at launch. In 32 bits it takes a multiplication, an addition and a shift, for dividends
// below 2^31 (Granlund and Montgomery, PLDI 1994); in 64 bits it is an ordinary division.
template <typename Index>
struct Divisor {
  Index divisor;

  Divisor() = default;
  explicit Divisor(int64_t value) : divisor(static_cast<Index>(value)) {}
  DCNZOO_HOST_DEVICE Index divide(Index dividend) const { return dividend / divisor; }
};

template <>
struct Divisor<int32_t> {
  int32_t divisor;
  uint32_t multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t value) : divisor(static_cast<int32_t>(value)), multiplier(0), shift(0) {
    while ((int64_t{1} << shift) < value) {
      ++shift;
    }
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - static_cast<uint64_t>(value)) << 32) / value + 1);
  }
  DCNZOO_HOST_DEVICE int32_t divide(int32_t dividend) const {
    const uint32_t number = static_cast<uint32_t>(dividend);
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(number) * multiplier) >> 32);
    return static_cast<int32_t>((high + number) >> shift);
  }
};

template <typename Index>
struct Pixel {
  Index row, column;
};

// An order of an image's pixels that keeps neighbours together: bands of a few rows, column by column within each, so
// that the pixels of a block sample overlapping parts of the value map and find them in the L1 cache.
template <typename Index>
struct PixelOrder {
  static constexpr int64_t kRows = 4;

  Index bands;                      // the last one may have fewer rows
  Divisor<Index> band, rows, last_rows;

  PixelOrder() = default;
  PixelOrder(int64_t height, int64_t width)
      : bands(static_cast<Index>((height + kRows - 1) / kRows)),
        band(std::min(kRows, height) * width),  // so that it is no more than there are pixels
        rows(kRows),
        last_rows(height - (bands - 1) * kRows) {}

  DCNZOO_HOST_DEVICE Pixel<Index> operator()(Index index) const {
    const Index band_index = band.divide(index);
    const Index within = index - band_index * band.divisor;
    const Divisor<Index> band_rows = band_index == bands - 1 ? last_rows : rows;
    const Index column = band_rows.divide(within);
    return {static_cast<Index>(band_index * kRows + within - column * band_rows.divisor), column};
  }
};

// The unit of work is a pair (output pixel, group). A lane takes `vector` of its channels at a time, so that `lanes`
// neighbouring lanes serve it; groups wider than what 32 lanes take need several rounds. A block works
// on one image and one slab of groups; the pairs of an image's slab are counted pixel by pixel.
template <typename Index>
struct Partition {
  int32_t lanes, rounds;
  int32_t pairs_per_warp;
  Divisor<int32_t> lanes_divisor;
  Index slab_groups, slabs;
  Index pairs;  // of one image and slab
  Divisor<Index> slab_divisor, chunk_divisor, image_divisor;
  PixelOrder<Index> order;
  int64_t blocks;

  Partition() = default;
  Partition(
      int64_t batch, int64_t out_height, int64_t out_width, int64_t groups, int64_t group_width, int64_t vector,
      int64_t warps)
      : order(out_height, out_width) {
    const int64_t vectors = group_width / vector;
    lanes = static_cast<int32_t>(std::min<int64_t>(vectors, kWarp));
    rounds = static_cast<int32_t>((vectors + lanes - 1) / lanes);
    pairs_per_warp = kWarp / lanes;
    lanes_divisor = Divisor<int32_t>(lanes);

    // Slabs are as narrow as keeps a quarter of a warp on one or two lines of L1, since narrow slabs leave room for more
    // neighbouring pixels in a block; all have the same number of groups.
    constexpr int64_t kSlabLanes = 8;
    int64_t width = std::min(groups, (kSlabLanes + lanes - 1) / lanes);
    while (groups % width != 0) {
      ++width;
    }
    slab_groups = static_cast<Index>(width);
    slabs = static_cast<Index>(groups / width);
    pairs = static_cast<Index>(out_height * out_width * width);
    const int64_t pairs_per_block = warps * pairs_per_warp;
    const int64_t chunks = (pairs + pairs_per_block - 1) / pairs_per_block;
    slab_divisor = Divisor<Index>(width);
    chunk_divisor = Divisor<Index>(chunks);
    image_divisor = Divisor<Index>(slabs);
    blocks = batch * slabs * chunks;
  }
};

// How the gather of the value map's gradient cuts a call: a warp owns a tile of the map and one group's channels, and
// visits chunks of output pixels, those whose samples fall into the tile.
struct GatherPartition {
  static constexpr int64_t kTileSide = 8, kChunkRows = 4, kChunkColumns = 8;

  int64_t tile_columns, tiles, chunk_columns, chunks;  // of one image

  GatherPartition(int64_t height, int64_t width, int64_t out_height, int64_t out_width)
      : tile_columns((width + kTileSide - 1) / kTileSide),
        tiles(tile_columns * ((height + kTileSide - 1) / kTileSide)),
        chunk_columns((out_width + kChunkColumns - 1) / kChunkColumns),
        chunks(chunk_columns * ((out_height + kChunkRows - 1) / kChunkRows)) {}

  // Samples fall near their output pixel in a network, so that a tile has about ten chunks. Nothing enforces it: the work
  // grows to tiles * chunks for offsets all over the map, which must not take minutes on a large one. And it hardly
  // depends on the group's width, which makes narrow groups cheaper to scatter.
  bool is_preferable(int64_t group_width) const {
    constexpr int64_t kMostVisits = int64_t{1} << 22, kLeastWidth = 8;
    return group_width >= kLeastWidth && tiles * chunks <= kMostVisits;
  }
};

}  // namespace dcnzoo
