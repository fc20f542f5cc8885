// The routing and mixing of dynamic convolution on CPU: sums over pixels, shares of the experts, and their sum.
#include "mixed_kernels.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "tensors.h"

namespace dcnzoo {
namespace {

using namespace cpu;

constexpr int64_t kLanes = 16;     // sums side by side, which the compiler makes vectors of
constexpr int64_t kPixels = 512;   // of a map whose channels lie together, added up at a time
constexpr int64_t kGrain = 32768;  // numbers that are worth a thread

template <typename F>
float sum_over(int64_t count, const F& term) {
  float lanes[kLanes] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += term(i + lane);
    }
  }
  for (; i < count; ++i) {
    sum += term(i);
  }
  for (int64_t lane = 0; lane < kLanes / 2; ++lane) {
    lanes[lane] += lanes[lane + kLanes / 2];
  }
  for (int64_t lane = 0; lane < kLanes / 2; ++lane) {
    sum += lanes[lane];
  }
  return sum;
}

// Adds up the channels' values over pixels, `width` channels in registers.
template <int64_t width>
void sum_columns(const float* x, int64_t pixels, int64_t channels, float* sums) {
  float lanes[width] = {};
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels) {
    for (int64_t lane = 0; lane < width; ++lane) {
      lanes[lane] += x[lane];
    }
  }
  std::copy(lanes, lanes + width, sums);
}

// Sums over the pixels of planes that lie one behind the other.
std::vector<float> sum_planes(const float* x, int64_t planes, int64_t pixels) {
  std::vector<float> sums(planes);
  torch::stable::parallel_for(0, planes, divide_up(kGrain, pixels), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const float* values = x + plane * pixels;
      sums[plane] = sum_over(pixels, [&](int64_t i) { return values[i]; });
    }
  });
  return sums;
}

// The same of maps whose channels lie together. Parts of a map have the same size on any number of threads, so that the
// sums have the same bits.
std::vector<float> sum_pixels(const float* x, int64_t batch, int64_t pixels, int64_t channels) {
  const int64_t parts = divide_up(pixels, kPixels);
  std::vector<float> partial(batch * parts * channels);
  const int64_t grain = divide_up(kGrain, std::min(pixels, kPixels) * channels);
  torch::stable::parallel_for(0, batch * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / parts, first = unit % parts * kPixels, last = std::min(first + kPixels, pixels);
      const float* values = x + (image * pixels + first) * channels;
      float* sums = partial.data() + unit * channels;
      int64_t channel = 0;
      for (; channel + 2 * kLanes <= channels; channel += 2 * kLanes) {
        sum_columns<2 * kLanes>(values + channel, last - first, channels, sums + channel);
      }
      for (; channel + 4 <= channels; channel += 4) {
        sum_columns<4>(values + channel, last - first, channels, sums + channel);
      }
      for (; channel < channels; ++channel) {
        sum_columns<1>(values + channel, last - first, channels, sums + channel);
      }
    }
  });
  if (parts == 1) {
    return partial;
  }
  std::vector<float> sums(batch * channels);
  for (int64_t unit = 0; unit < batch * parts; ++unit) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      sums[unit / parts * channels + channel] += partial[unit * channels + channel];
    }
  }
  return sums;
}

void normalise(float* logits, int64_t experts) {
  const float highest = *std::max_element(logits, logits + experts);
  float sum = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    logits[expert] = std::exp(logits[expert] - highest);
    sum += logits[expert];
  }
  for (int64_t expert = 0; expert < experts; ++expert) {
    logits[expert] /= sum;
  }
}

// The linear map of the averages, and from it the shares.
std::vector<float> find_shares(
    const std::vector<float>& sums, int64_t batch, int64_t pixels, const Tensor& weight, const std::optional<Tensor>& bias,
    double temperature, bool softmax) {
  const int64_t experts = weight.size(0), channels = weight.size(1);
  const float* rows = static_cast<const float*>(weight.const_data_ptr());
  const float* shift = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  const int64_t step = bias ? bias->stride(0) : 0;
  std::vector<float> shares(batch * experts);
  for (int64_t image = 0; image < batch; ++image) {
    const float* sum = sums.data() + image * channels;
    float* share = shares.data() + image * experts;
    for (int64_t expert = 0; expert < experts; ++expert) {
      const float* row = rows + expert * channels;
      const float total = sum_over(channels, [&](int64_t i) { return row[i] * sum[i]; });
      const float logit = total / static_cast<float>(pixels) + (shift ? shift[expert * step] : 0.0f);
      share[expert] = logit / static_cast<float>(temperature);
    }
    if (softmax) {
      normalise(share, experts);
    } else {
      std::transform(share, share + experts, share, [](float logit) { return 1 / (1 + std::exp(-logit)); });
    }
  }
  return shares;
}

// Writes the elements [begin, end) of the sum of `count` experts, or adds them to what is there.
template <int64_t count>
void mix(const float* experts, int64_t stride, const float* shares, int64_t begin, int64_t end, bool add, float* kernel) {
  for (int64_t k = begin; k < end; ++k) {
    float sum = add ? kernel[k] : 0;
    for (int64_t i = 0; i < count; ++i) {
      sum += shares[i] * experts[i * stride + k];
    }
    kernel[k] = sum;
  }
}

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& experts) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions (N, C, H, W), got ", x.dim());
  STD_TORCH_CHECK(x.size(2) > 0 && x.size(3) > 0, "x must have pixels, got ", x.size(2), " x ", x.size(3));
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == x.size(1), "weight must have shape (E, ", x.size(1),
      "), E positive");
  STD_TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias must have shape (", weight.size(0), ")");
  STD_TORCH_CHECK(
      experts.dim() == 2 && experts.size(0) == weight.size(0), "experts must have shape (", weight.size(0), ", K)");
  for (const Tensor& tensor : {x, weight, bias ? *bias : x, experts}) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "x, weight, bias and experts must be float32");
  }
}

}  // namespace

Tensor mixed_kernels(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& experts, double temperature,
    bool softmax) {
  check(x, weight, bias, experts);
  const int64_t batch = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const int64_t count = experts.size(0), size = experts.size(1);
  const bool together = x.stride(1) == 1 && x.stride(3) == channels && x.stride(2) == channels * x.size(3) &&
                        x.stride(0) == channels * pixels;
  const Tensor map = together ? x : torch::stable::contiguous(x);
  const float* values = static_cast<const float*>(map.const_data_ptr());
  const std::vector<float> sums =
      together ? sum_pixels(values, batch, pixels, channels) : sum_planes(values, batch * channels, pixels);
  const std::vector<float> shares =
      find_shares(sums, batch, pixels, torch::stable::contiguous(weight), bias, temperature, softmax);

  Tensor kernels = new_empty(x, std::array{batch, size});
  const Tensor bank = torch::stable::contiguous(experts);
  const float* rows = static_cast<const float*>(bank.const_data_ptr());
  float* mixed = static_cast<float*>(kernels.mutable_data_ptr());
  torch::stable::parallel_for(0, size, divide_up(kGrain, count), [&](int64_t begin, int64_t end) {
    for (int64_t image = 0; image < batch; ++image) {
      const float* share = shares.data() + image * count;
      float* kernel = mixed + image * size;
      int64_t expert = 0;
      for (; expert + 4 <= count; expert += 4) {
        mix<4>(rows + expert * size, size, share + expert, begin, end, expert > 0, kernel);
      }
      for (; expert < count; ++expert) {
        mix<1>(rows + expert * size, size, share + expert, begin, end, expert > 0, kernel);
      }
    }
  });
  return kernels;
}

}  // namespace dcnzoo
