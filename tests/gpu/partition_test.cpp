// Exhausts the launch arithmetic of csrc/cuda/partition.h over thousands of shapes; prints the first thing that is wrong.
#include "../../csrc/cuda/partition.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using namespace dcnzoo;

static void require(bool condition, const char* what, int64_t a, int64_t b, int64_t c = 0, int64_t d = 0) {
  if (!condition) {
    std::printf("%s: %lld %lld %lld %lld\n", what, (long long)a, (long long)b, (long long)c, (long long)d);
    std::exit(1);
  }
}

static void check_divisors(std::mt19937_64& random) {
  std::vector<int64_t> divisors{1, 2, 3, 5, 7, 27, 49, 641, 3136, 65535, 65536, 65537, (1 << 30) - 1, 1 << 30, kInt32Max};
  for (int i = 0; i < 4000; ++i) {
    divisors.push_back(1 + static_cast<int64_t>(random() % (uint64_t{1} << (1 + random() % 31))) % kInt32Max);
  }
  for (const int64_t divisor : divisors) {
    const Divisor<int32_t> fast(divisor);
    std::vector<int64_t> dividends{0, 1, divisor - 1, divisor, divisor + 1, 2 * divisor - 1, kInt32Max - 1, kInt32Max};
    for (int i = 0; i < 200; ++i) {
      const int64_t multiple = static_cast<int64_t>(random() % (kInt32Max / divisor + 1)) * divisor;
      dividends.insert(dividends.end(), {multiple - 1, multiple, static_cast<int64_t>(random() % kInt32Max)});
    }
    for (const int64_t dividend : dividends) {
      if (dividend >= 0 && dividend <= kInt32Max) {
        require(fast.divide(static_cast<int32_t>(dividend)) == dividend / divisor, "quotient", dividend, divisor);
      }
    }
  }
}

template <typename Index>
static void check_order(int64_t height, int64_t width) {
  const PixelOrder<Index> order(height, width);
  std::vector<bool> seen(height * width);
  for (int64_t i = 0; i < height * width; ++i) {
    const auto pixel = order(static_cast<Index>(i));
    const bool inside = pixel.row >= 0 && pixel.row < height && pixel.column >= 0 && pixel.column < width;
    require(inside, "pixel outside", height, width, pixel.row, pixel.column);
    require(!seen[pixel.row * width + pixel.column], "pixel met twice", height, width, pixel.row, pixel.column);
    seen[pixel.row * width + pixel.column] = true;
  }
}

template <typename Index>
static void check_partition(
    int64_t batch, int64_t height, int64_t width, int64_t groups, int64_t group_width, int64_t vector, int64_t warps) {
  const Partition<Index> partition(batch, height, width, groups, group_width, vector, warps);
  const int64_t vectors = group_width / vector;
  require(partition.lanes >= 1 && partition.lanes <= kWarp, "lanes", partition.lanes, group_width);
  require(int64_t{partition.lanes} * partition.rounds >= vectors, "channels left out", group_width, vector);
  require(int64_t{partition.lanes} * (partition.rounds - 1) < vectors, "idle round", group_width, vector);
  require(partition.pairs_per_warp >= 1 && partition.pairs_per_warp * partition.lanes <= kWarp, "pairs", group_width, vector);
  require(partition.slab_groups * partition.slabs == groups, "slabs", groups, partition.slab_groups);
  require(int64_t{partition.pairs} == height * width * partition.slab_groups, "pairs of a slab", height, width, groups);
  const int64_t chunks = partition.chunk_divisor.divisor, per_block = warps * partition.pairs_per_warp;
  require(chunks * per_block >= partition.pairs, "pairs left out", height, width, groups, group_width);
  require((chunks - 1) * per_block < partition.pairs, "idle block", height, width, groups, group_width);
  require(partition.blocks == batch * partition.slabs * chunks, "blocks", batch, partition.slabs, chunks);
}

int main() {
  std::mt19937_64 random(1);
  const auto draw = [&](int64_t low, int64_t high) { return low + static_cast<int64_t>(random() % (high - low + 1)); };
  check_divisors(random);
  for (int64_t height = 1; height <= 13; ++height) {
    for (int64_t width = 1; width <= 13; ++width) {
      check_order<int32_t>(height, width);
      check_order<int64_t>(height, width);
    }
  }
  check_order<int32_t>(200, 321);
  // Rows so long that four of them are more pixels than an int32_t counts.
  const PixelOrder<int32_t> row(1, 1 << 30);
  for (const int64_t i : {0, 1, (1 << 29) + 1, (1 << 30) - 1}) {
    const auto pixel = row(static_cast<int32_t>(i));
    require(pixel.row == 0 && pixel.column == i, "pixel of a long row", i, pixel.row, pixel.column);
  }
  for (int i = 0; i < 20000; ++i) {
    const int64_t vector = int64_t{1} << draw(0, 4);
    const int64_t group_width = vector * draw(1, 80), groups = draw(1, 64), warps = draw(1, 8);
    const int64_t batch = draw(0, 128), height = draw(1, 300), width = draw(1, 300);
    check_partition<int32_t>(batch, height, width, groups, group_width, vector, warps);
    check_partition<int64_t>(batch * 1000, height * 100, width * 100, groups, group_width, vector, warps);
    const GatherPartition gather(height, width, draw(1, 300), draw(1, 300));
    require(gather.tiles * GatherPartition::kTileSide * GatherPartition::kTileSide >= height * width, "tiles", height, width);
  }
  const GatherPartition small(56, 56, 56, 56), large(4096, 4096, 4096, 4096);
  require(small.is_preferable(16) && !small.is_preferable(4) && !large.is_preferable(16), "choice", 0, 0);
  std::printf("ok\n");
}
