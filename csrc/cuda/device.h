// The CUDA features that the kernels use, behind few names.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <string>
#include <type_traits>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "../common.h"

namespace dcnzoo {

constexpr unsigned kAllLanes = 0xffffffffu;

// Half types are computed in float32.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T element[kSize];
};

// The widest vector of a type that one load can bring: 16 bytes.
template <typename T>
constexpr int kWide = 16 / sizeof(T);

// Keeps a pointer to global memory in its register: the compiler would rather compute it afresh, at every use.
template <typename T>
__device__ __forceinline__ T* keep(T* pointer) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// The largest integer not above a number; for one that is not finite, or too large, some integer.
__device__ __forceinline__ void round_down(float number, int32_t& rounded) { rounded = __float2int_rd(number); }
__device__ __forceinline__ void round_down(float number, int64_t& rounded) { rounded = __float2ll_rd(number); }
__device__ __forceinline__ void round_down(double number, int32_t& rounded) { rounded = __double2int_rd(number); }
__device__ __forceinline__ void round_down(double number, int64_t& rounded) { rounded = __double2ll_rd(number); }

// Adds to global memory without returning the old values; four at a time where the device can.
template <int kSize>
__device__ __forceinline__ void add_to(float* address, const float (&term)[kSize]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kByFour = kSize % 4 == 0;
#else
  constexpr bool kByFour = false;
#endif
  if constexpr (kByFour) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address + i), "f"(term[i]), "f"(term[i + 1]),
                   "f"(term[i + 2]), "f"(term[i + 3])
                   : "memory");
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      atomicAdd(address + i, term[i]);
    }
  }
}

template <int kSize>
__device__ __forceinline__ void add_to(double* address, const double (&term)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    atomicAdd(address + i, term[i]);
  }
}

// Products of bfloat16 matrices by the matrix units, from compute capability 8.0 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasMatrixUnit = false;
#else
constexpr bool kHasMatrixUnit = true;
#endif

// sum += a * b for a 16 x 16 and a 16 x 8 matrix spread over a warp's registers as PTX's mma.m16n8k16 defines.
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
  mma_m16n8k16_bf16(sum, a, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two float32 numbers as sums of two bfloat16 numbers each, the first of both and the second of both packed together.
__device__ __forceinline__ void split(const Vector<float, 2>& numbers, uint32_t& high, uint32_t& low) {
  const auto round = [](float first, float second) {
#if defined(__CUDACC__)
    return __floats2bfloat162_rn(first, second);
#else
    return Vector<BFloat16, 2>{{BFloat16(first), BFloat16(second)}};
#endif
  };
  const auto bits = [](uint32_t number) {
    float value;
    std::memcpy(&value, &number, sizeof(value));
    return value;
  };
  const auto rounded = round(numbers.element[0], numbers.element[1]);
  std::memcpy(&high, &rounded, sizeof(high));
  const auto rest =
      round(numbers.element[0] - bits(high << 16), numbers.element[1] - bits(high & 0xffff0000u));
  std::memcpy(&low, &rest, sizeof(low));
}

// Makes the device of a call's tensors current for a scope, and knows its current stream.
class DeviceScope {
 public:
  explicit DeviceScope(std::initializer_list<const Tensor*> tensors) : guard_(common_device(tensors)) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(common_device(tensors), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    if (blocks == 0) {
      return;
    }
    STD_TORCH_CHECK(blocks <= 0x7fffffff, "a grid of ", blocks, " blocks is too large for CUDA");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

 private:
  // TorchScript comes here without the checks in Python, and a kernel that reads another device's memory ends the process.
  static int32_t common_device(std::initializer_list<const Tensor*> tensors) {
    const Tensor& first = **tensors.begin();
    for (const Tensor* tensor : tensors) {
      STD_TORCH_CHECK(
          tensor->is_cuda() == first.is_cuda() && tensor->get_device_index() == first.get_device_index(),
          "all tensors must be on the same device, got ", describe(first), " and ", describe(*tensor));
    }
    return first.get_device_index();
  }
  static std::string describe(const Tensor& tensor) {
    return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "one that is not CUDA";
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace dcnzoo
