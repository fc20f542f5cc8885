// Depthwise convolution in vectors of channels, or of neighbours in a row. Included within a region compiled for one instruction set, where
// VectorFor<float> is the vector to compute with.
#pragma once

namespace {

using Vector = VectorFor<float>;
constexpr int64_t kLanes = Vector::kLanes;

// Neighbouring channels of a pixel in `count` vectors, all whole or the last with `tail` lanes.
template <int64_t count, bool whole>
struct Channels {
  Vector vectors[count];

  static DCNZOO_INLINE Channels load(const float* p, int64_t tail) {
    Channels channels;
    for (int64_t i = 0; i + 1 < count; ++i) {
      channels.vectors[i] = Vector::load(p + i * kLanes);
    }
    const float* last = p + (count - 1) * kLanes;
    channels.vectors[count - 1] = whole ? Vector::load(last) : Vector::load_first(last, tail);
    return channels;
  }
  DCNZOO_INLINE void store(float* p, int64_t tail) const {
    for (int64_t i = 0; i + 1 < count; ++i) {
      vectors[i].store(p + i * kLanes);
    }
    if (whole) {
      vectors[count - 1].store(p + (count - 1) * kLanes);
    } else {
      vectors[count - 1].store_first(p + (count - 1) * kLanes, tail);
    }
  }
  DCNZOO_INLINE void clear() {
    for (Vector& vector : vectors) {
      vector = Vector::broadcast(0);
    }
  }
  DCNZOO_INLINE void add_product(const Channels& a, const Channels& b) {
    for (int64_t i = 0; i < count; ++i) {
      vectors[i] = fma(a.vectors[i], b.vectors[i], vectors[i]);
    }
  }
};

// Some channels of an image's target, whose first is `channel`; `tail` of them are in the last vector.
template <typename Channels>
struct Gatherer {
  const DepthwiseGather& call;
  int64_t image, channel, tail;

  // `pixels` neighbours of a row that have the same taps.
  template <int64_t pixels>
  DCNZOO_INLINE void gather(int64_t row, int64_t column) const {
    const int64_t channels = call.channels, step = call.columns.step * channels;
    const float* source = call.source + image * call.source_height * call.source_width * channels + channel;
    const float* kernels = call.kernels + image * call.kernel_h * call.kernel_w * channels + channel;
    Channels sums[pixels];
    for (auto& sum : sums) {
      sum.clear();
    }
    for (const Reach::Tap* y = call.rows.begin(row); y != call.rows.end(row); ++y) {
      for (const Reach::Tap* x = call.columns.begin(column); x != call.columns.end(column); ++x) {
        const auto kernel = Channels::load(kernels + (y->tap * call.kernel_w + x->tap) * channels, tail);
        const float* values = source + (y->other * call.source_width + x->other) * channels;
        for (int64_t i = 0; i < pixels; ++i) {
          sums[i].add_product(Channels::load(values + i * step, tail), kernel);
        }
      }
    }
    float* target =
        call.target + ((image * call.rows.size() + row) * call.columns.size() + column) * channels + channel;
    for (int64_t i = 0; i < pixels; ++i) {
      sums[i].store(target + i * channels, tail);
    }
  }

  void gather_row(int64_t row) const {
    constexpr int64_t kPixels = 4;
    for (int64_t column = 0; column < call.columns.size();) {
      if (call.columns.alike(column) >= kPixels) {
        gather<kPixels>(row, column);
        column += kPixels;
      } else {
        gather<1>(row, column++);
      }
    }
  }
};

// Adds up grad_output * x over an image's pixels into sums (kernel_h * kernel_w, kCorrelatedChannels), zero at first.
template <typename Channels>
struct Correlator {
  const DepthwiseCorrelation& call;
  int64_t image, channel, tail;
  float* sums;

  // `taps` neighbours of the kernel over the output's columns [begin, end) of a row.
  template <int64_t taps>
  DCNZOO_INLINE void correlate(int64_t row, int64_t source, int64_t tap, int64_t begin, int64_t end) const {
    if (begin >= end) {
      return;
    }
    const Side &rows = call.rows, &columns = call.columns;
    const int64_t channels = call.channels, tap_w = tap % columns.kernel;
    const float* grads =
        call.grad_output + ((image * rows.out_size + row) * columns.out_size + begin) * channels + channel;
    const float* x = call.x + ((image * rows.size + source) * columns.size) * channels + channel +
                     columns.source(begin, tap_w) * channels;
    Channels found[taps];
    for (int64_t i = 0; i < taps; ++i) {
      found[i] = Channels::load(sums + (tap + i) * kCorrelatedChannels, tail);
    }
    for (int64_t column = begin; column < end; ++column, grads += channels, x += columns.stride * channels) {
      const auto grad = Channels::load(grads, tail);
      for (int64_t i = 0; i < taps; ++i) {
        found[i].add_product(grad, Channels::load(x + i * columns.dilation * channels, tail));
      }
    }
    for (int64_t i = 0; i < taps; ++i) {
      found[i].store(sums + (tap + i) * kCorrelatedChannels, tail);
    }
  }

  // The same with the columns at the map's sides, where not every tap finds a value.
  template <int64_t taps>
  void correlate_row(int64_t row, int64_t source, int64_t tap) const {
    const Side& columns = call.columns;
    const int64_t tap_w = tap % columns.kernel;
    // The first tap is the last to enter the map, the last tap the first to leave it.
    const int64_t begin = columns.first_out(0, tap_w);
    const int64_t end = std::max(begin, columns.first_out(columns.size, tap_w + taps - 1));
    for (int64_t i = 0; i < taps; ++i) {
      const int64_t first = columns.first_out(0, tap_w + i), last = columns.first_out(columns.size, tap_w + i);
      correlate<1>(row, source, tap + i, first, std::min(begin, last));
      correlate<1>(row, source, tap + i, std::max(end, first), last);
    }
    correlate<taps>(row, source, tap, begin, end);
  }

  void correlate_image() const {
    const Side &rows = call.rows, &columns = call.columns;
    for (int64_t row = 0; row < rows.out_size; ++row) {
      for (int64_t tap_h = 0; tap_h < rows.kernel; ++tap_h) {
        const int64_t source = rows.source(row, tap_h);
        if (source < 0 || source >= rows.size) {
          continue;
        }
        int64_t tap = tap_h * columns.kernel, left = columns.kernel;
        for (; left >= 3; left -= 3, tap += 3) {
          correlate_row<3>(row, source, tap);
        }
        for (; left > 0; --left, ++tap) {
          correlate_row<1>(row, source, tap);
        }
      }
    }
  }
};

// Calls f(their type, first channel, lanes of the last vector) for the channels [begin, end), two vectors at a time,
// which leaves registers for several pixels or taps.
template <typename F>
DCNZOO_INLINE void for_each_group(int64_t begin, int64_t end, const F& f) {
  for (; end - begin >= 2 * kLanes; begin += 2 * kLanes) {
    f(Channels<2, true>(), begin, kLanes);
  }
  if (end - begin > kLanes) {
    f(Channels<2, false>(), begin, end - begin - kLanes);
  } else if (end - begin == kLanes) {
    f(Channels<1, true>(), begin, kLanes);
  } else if (end > begin) {
    f(Channels<1, false>(), begin, end - begin);
  }
}

// A channel of an image with its padding, from which every tap reads vectors for neighbours of the output: columns that
// lie `stride` apart are neighbours here.
class Plane {
 public:
  Plane(const Side& rows, const Side& columns)
      : rows_(rows),
        columns_(columns),
        length_((columns.out_size + kLanes - 1) / kLanes * kLanes + span(columns) / columns.stride),
        width_(columns.stride * length_),
        values_(((rows.out_size - 1) * rows.stride + span(rows) + 1) * width_) {
    for (int64_t i = 0; i < rows.kernel; ++i) {
      for (int64_t j = 0; j < columns.kernel; ++j) {
        taps_.push_back(i * rows.dilation * width_ + place(j * columns.dilation));
      }
    }
  }

  // The padding stays as it is.
  void fill(const float* x) {
    const int64_t height = static_cast<int64_t>(values_.size()) / width_;
    for (int64_t row = rows_.pad; row < std::min(height, rows_.pad + rows_.size); ++row) {
      fill_row(values_.data() + row * width_, x + (row - rows_.pad) * columns_.size);
    }
  }

  void convolve(const float* kernel, float* target) const {
    constexpr int64_t kRows = 4;
    int64_t row = 0;
    for (; row + kRows <= rows_.out_size; row += kRows) {
      convolve_rows<kRows>(kernel, row, target + row * columns_.out_size);
    }
    for (; row < rows_.out_size; ++row) {
      convolve_rows<1>(kernel, row, target + row * columns_.out_size);
    }
  }

 private:
  static int64_t span(const Side& side) { return (side.kernel - 1) * side.dilation; }

  // Where a column of the padded map lies in a row.
  int64_t place(int64_t column) const { return column % columns_.stride * length_ + column / columns_.stride; }

  void fill_row(float* row, const float* x) const {
    const int64_t stride = columns_.stride;
    const int64_t count = std::max<int64_t>(0, std::min(columns_.size, width_ - columns_.pad));
    int64_t done = 0;
    if (stride == 2) {
      float *first = row + place(columns_.pad), *second = row + place(columns_.pad + 1);
      for (; done + 2 * kLanes <= count; done += 2 * kLanes) {
        Vector even, odd;
        Vector::split_pairs(Vector::load(x + done), Vector::load(x + done + kLanes), even, odd);
        even.store(first + done / 2);
        odd.store(second + done / 2);
      }
    }
    for (int64_t part = 0; part < stride; ++part) {
      float* to = row + place(columns_.pad + done + part);
      for (int64_t column = done + part; column < count; column += stride) {
        *to++ = x[column];
      }
    }
  }

  template <int64_t count>
  DCNZOO_INLINE void convolve_rows(const float* kernel, int64_t row, float* target) const {
    const int64_t step = rows_.stride * width_, taps = static_cast<int64_t>(taps_.size());
    const float* values = values_.data() + row * step;
    for (int64_t column = 0; column < columns_.out_size; column += kLanes) {
      Vector sums[count];
      for (Vector& sum : sums) {
        sum = Vector::broadcast(0);
      }
      for (int64_t tap = 0; tap < taps; ++tap) {
        const Vector weight = Vector::broadcast(kernel[tap]);
        const float* from = values + taps_[tap] + column;
        for (int64_t i = 0; i < count; ++i) {
          sums[i] = fma(Vector::load(from + i * step), weight, sums[i]);
        }
      }
      const int64_t left = columns_.out_size - column;
      for (int64_t i = 0; i < count; ++i) {
        float* to = target + i * columns_.out_size + column;
        left >= kLanes ? sums[i].store(to) : sums[i].store_first(to, left);
      }
    }
  }

  const Side rows_, columns_;
  const int64_t length_, width_;
  std::vector<float> values_;
  std::vector<int64_t> taps_;
};

}  // namespace

void convolve(const DepthwisePlanes& call, int64_t begin, int64_t end) {
  const Side &rows = call.rows, &columns = call.columns;
  Plane plane(rows, columns);
  for (int64_t index = begin; index < end; ++index) {
    plane.fill(call.x + index * rows.size * columns.size);
    plane.convolve(
        call.kernels + index * rows.kernel * columns.kernel, call.target + index * rows.out_size * columns.out_size);
  }
}

void gather(const DepthwiseGather& call, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    for_each_group(0, call.channels, [&](auto channels, int64_t channel, int64_t tail) {
      Gatherer<decltype(channels)>{call, index / call.rows.size(), channel, tail}.gather_row(index % call.rows.size());
    });
  }
}

void correlate(const DepthwiseCorrelation& call, int64_t begin, int64_t end) {
  const int64_t taps = call.rows.kernel * call.columns.kernel;
  const int64_t parts = (call.channels + kCorrelatedChannels - 1) / kCorrelatedChannels;
  std::vector<float> sums(taps * kCorrelatedChannels);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / parts, first = unit % parts * kCorrelatedChannels;
    const int64_t last = std::min(first + kCorrelatedChannels, call.channels);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for_each_group(first, last, [&](auto channels, int64_t channel, int64_t tail) {
      Correlator<decltype(channels)>{call, image, channel, tail, sums.data() + channel - first}.correlate_image();
    });
    for (int64_t channel = first; channel < last; ++channel) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        call.grad_kernels[(image * call.channels + channel) * taps + tap] =
            sums[tap * kCorrelatedChannels + channel - first];
      }
    }
  }
}
