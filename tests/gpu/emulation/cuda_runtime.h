// Runs CUDA kernels on the host, thread by thread: enough of the CUDA language and runtime for dcnzoo's kernels. It takes
// the place of CUDA's own header when the .cu files are compiled as C++.
//
// Every thread of a block is a fiber. A fiber runs until it meets a warp- or block-wide operation, which completes once
// all threads concerned have met the same one. Between two such operations the threads run one after another in a random
// order, so that a missing barrier shows as a wrong or changing result. Blocks run one after another.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {

inline void check(bool condition, const char* message) {
  if (!condition) {
    std::fprintf(stderr, "CUDA emulation: %s\n", message);
    std::abort();
  }
}

enum class Operation { kNone, kDone, kSyncThreads, kSyncWarp, kAll, kBallot, kShuffle, kMatrix };

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

struct Fiber {
  static constexpr size_t kStack = 128 * 1024;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Operation waits_for = Operation::kNone;
  uint64_t operand = 0;
  int source = 0;
  uint64_t result = 0;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  uint64_t random = 88172645463325252ull;

  static Machine& instance() {
    static Machine machine;
    return machine;
  }
  uint64_t draw() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }
};

inline dim3 thread_index, block_index;

inline void enter() {
  Machine& machine = Machine::instance();
  (*machine.body)();
  machine.current->waits_for = Operation::kDone;
  swapcontext(&machine.current->context, &machine.scheduler);
}

// Called by a thread: waits until all threads concerned have come to the same operation, and returns its result.
inline uint64_t wait(Operation operation, uint64_t operand = 0, int source = 0) {
  Machine& machine = Machine::instance();
  Fiber* fiber = machine.current;
  fiber->waits_for = operation;
  fiber->operand = operand;
  fiber->source = source;
  swapcontext(&fiber->context, &machine.scheduler);
  return fiber->result;
}

// A lane's registers of sum += a * b on the matrix unit, as PTX lays out mma.m16n8k16 for bfloat16: lane l holds
// a(l / 4 [+ 8], 2 * (l % 4) [+ 8] and the next column), b's rows likewise in column l / 4, and
// sum(l / 4 [+ 8], 2 * (l % 4) and the next column).
struct Matrices {
  float* sum;
  const uint32_t *a, *b;

  static float number(uint32_t packed, int index) {
    return from_bits<float>(index % 2 == 0 ? packed << 16 : packed & 0xffff0000u);
  }
};

inline void multiply(Machine& machine, size_t begin) {
  Matrices lanes[32];
  for (int lane = 0; lane < 32; ++lane) {
    lanes[lane] = *from_bits<Matrices*>(machine.fibers[begin + lane]->operand);
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float& sum = lanes[row % 8 * 4 + column / 2].sum[row / 8 * 2 + column % 2];
      for (int k = 0; k < 16; ++k) {
        const float a = Matrices::number(lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k);
        const float b = Matrices::number(lanes[column * 4 + k % 8 / 2].b[k / 8], k);
        sum += a * b;
      }
    }
  }
}

inline void finish_warp_operation(Machine& machine, size_t begin, size_t end) {
  Operation operation = Operation::kNone;
  uint64_t ballot = 0;
  bool all = true;
  for (size_t i = begin; i < end; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    if (fiber.waits_for == Operation::kDone) {
      continue;
    }
    check(operation == Operation::kNone || operation == fiber.waits_for, "the lanes of a warp met different operations");
    operation = fiber.waits_for;
    all = all && fiber.operand != 0;
    ballot |= uint64_t{fiber.operand != 0} << (i - begin);
  }
  if (operation == Operation::kMatrix) {
    multiply(machine, begin);
  }
  for (size_t i = begin; i < end; ++i) {
    Fiber& fiber = *machine.fibers[i];
    if (fiber.waits_for == Operation::kDone) {
      continue;
    }
    if (operation == Operation::kShuffle) {
      check(begin + fiber.source < end, "a shuffle from beyond the warp");
      check(machine.fibers[begin + fiber.source]->waits_for != Operation::kDone, "a shuffle from a lane that has returned");
      fiber.result = machine.fibers[begin + fiber.source]->operand;
    } else {
      fiber.result = operation == Operation::kBallot ? ballot : all;
    }
  }
  for (size_t i = begin; i < end; ++i) {
    if (machine.fibers[i]->waits_for != Operation::kDone) {
      machine.fibers[i]->waits_for = Operation::kNone;
    }
  }
}

inline void run_block(unsigned threads, const std::function<void()>& body) {
  Machine& machine = Machine::instance();
  machine.body = &body;
  while (machine.fibers.size() < threads) {
    machine.fibers.push_back(std::make_unique<Fiber>());
  }
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *machine.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.waits_for = Operation::kNone;
  }
  for (;;) {
    const uint64_t turn = machine.draw();
    bool progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned index = turn & 1 ? (i + (turn >> 8)) % threads : threads - 1 - (i + (turn >> 8)) % threads;
      Fiber& fiber = *machine.fibers[index];
      if (fiber.waits_for == Operation::kNone) {
        machine.current = &fiber;
        thread_index = dim3(index, 0, 0);
        swapcontext(&machine.scheduler, &fiber.context);
        progress = true;
      }
    }
    unsigned done = 0, at_barrier = 0;
    for (unsigned begin = 0; begin < threads; begin += 32) {
      const unsigned end = begin + 32 < threads ? begin + 32 : threads;
      unsigned returned = 0, synchronizing = 0;
      for (unsigned i = begin; i < end; ++i) {
        returned += machine.fibers[i]->waits_for == Operation::kDone;
        synchronizing += machine.fibers[i]->waits_for == Operation::kSyncThreads;
      }
      done += returned;
      at_barrier += synchronizing;
      if (returned + synchronizing < end - begin) {
        finish_warp_operation(machine, begin, end);
        progress = true;
      }
    }
    if (done == threads) {
      return;
    }
    if (done + at_barrier == threads) {
      for (unsigned i = 0; i < threads; ++i) {
        if (machine.fibers[i]->waits_for == Operation::kSyncThreads) {
          machine.fibers[i]->waits_for = Operation::kNone;
        }
      }
      progress = true;
    }
    check(progress, "the threads of a block wait for one another");
  }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index

inline void __syncthreads() { emulation::wait(emulation::Operation::kSyncThreads); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::wait(emulation::Operation::kSyncWarp, 1); }
inline int __all_sync(unsigned, int predicate) { return emulation::wait(emulation::Operation::kAll, predicate != 0) != 0; }
inline unsigned __ballot_sync(unsigned, int predicate) {
  return static_cast<unsigned>(emulation::wait(emulation::Operation::kBallot, predicate != 0));
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::from_bits<T>(emulation::wait(emulation::Operation::kShuffle, emulation::to_bits(value), source));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, static_cast<int>((threadIdx.x % 32) ^ lanes));
}
template <typename Integer, typename T>
Integer emulated_round_down(T number) {
  const T limit = std::ldexp(T(1), sizeof(Integer) * 8 - 1), rounded = std::floor(number);
  return !(rounded == rounded) ? Integer(0)
         : rounded >= limit    ? std::numeric_limits<Integer>::max()
         : rounded < -limit    ? std::numeric_limits<Integer>::min()
                               : static_cast<Integer>(rounded);
}
inline int __float2int_rd(float number) { return emulated_round_down<int>(number); }
inline int __double2int_rd(double number) { return emulated_round_down<int>(number); }
inline long long __float2ll_rd(float number) { return emulated_round_down<long long>(number); }
inline long long __double2ll_rd(double number) { return emulated_round_down<long long>(number); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }


inline void mma_m16n8k16_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::Matrices matrices{sum, a, b};
  emulation::wait(emulation::Operation::kMatrix, emulation::to_bits(&matrices));
}

template <typename T>
T atomicAdd(T* address, T term) {
  const T old = *address;
  *address = old + term;
  return old;
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (unsigned block = 0; block < config->gridDim.x; ++block) {
    emulation::block_index = dim3(block, 0, 0);
    emulation::run_block(config->blockDim.x, body);
  }
  return cudaSuccess;
}
