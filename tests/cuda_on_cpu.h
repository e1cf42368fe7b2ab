// Runs the kernels of csrc/*.cu on a CPU, thread by thread: the test of their logic on machines
// without a GPU (tests/test_ops.py).
//
// The threads of a block are contexts that are switched at __syncthreads and at the warp's exchanges,
// where each waits for the others; blocks run one after the other. It says nothing about speed, and finds
// no race between two such points. A block in which some threads wait at a barrier that the others never
// reach ends the program.
//
// What a GPU does not promise is not given here either: half of the blocks, drawn by a fixed stream, run
// their warps and threads from the last to the first, and shared memory holds NaN when a block begins. It is
// thread-local memory of this library, which is how it is found.
#pragma once
#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static thread_local
#define __syncthreads() on_cpu::wait(on_cpu::BLOCK)
#define UNWRAP(...) __VA_ARGS__
#define LAUNCH(kernel, blocks, threads, stream, ...) \
  (on_cpu::run(blocks, threads, [&] { UNWRAP kernel(__VA_ARGS__); }), 0)
#define stop_with(message) (fprintf(stderr, "%s\n", message), abort())

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_cpu {

enum State { READY, WARP, BLOCK, DONE };

struct Thread {
  ucontext_t context;  // to start with; going on is a jump, which asks nothing of the kernel
  jmp_buf here;
  bool started = false;
  std::vector<char> stack = std::vector<char>(64 << 10);
  State state = READY;
};

inline std::vector<Thread> threads;
inline std::vector<uint64_t> given,
    taken;  // a word of each thread: what it hands to its warp, and what the warp was handed
inline jmp_buf scheduler;
inline unsigned current;
inline std::function<void()> body;

// All shared memory of all kernels: this library's thread-local variables.
struct Shared {
  char* from = nullptr;
  size_t size = 0;
};
inline int find_shared(dl_phdr_info* library, size_t, void* found) {
  bool ours = false;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& part = library->dlpi_phdr[i];
    const uintptr_t begin = library->dlpi_addr + part.p_vaddr;
    ours |= part.p_type == PT_LOAD && uintptr_t(&find_shared) >= begin &&
            uintptr_t(&find_shared) < begin + part.p_memsz;
  }
  for (int i = 0; ours && i < library->dlpi_phnum; ++i)
    if (library->dlpi_phdr[i].p_type == PT_TLS)
      *(Shared*)found = {(char*)library->dlpi_tls_data, library->dlpi_phdr[i].p_memsz};
  return ours;
}

inline thread_local char anchor;  // read once, so that the thread has its memory

inline bool reversed() {  // the next number of a fixed stream
  static uint64_t state = 1;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return state >> 63;
}

inline unsigned lane() { return current % 32; }

inline void wait(State at) {
  threads[current].state = at;
  if (!_setjmp(threads[current].here)) _longjmp(scheduler, 1);
}

inline void resume(Thread& t) {
  if (_setjmp(scheduler)) return;
  if (t.started) _longjmp(t.here, 1);
  t.started = true;
  setcontext(&t.context);
}

inline void start() {
  body();
  wait(DONE);
}

inline void run_block(unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = threads[i];
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = nullptr;
    makecontext(&t.context, start, 0);
    t.state = READY, t.started = false;
  }
  auto all = [&](unsigned from, unsigned to, State state) {  // of those that are not done; none is not all
    bool any = false;
    for (unsigned i = from; i < to; ++i) {
      if (threads[i].state != DONE && threads[i].state != state) return false;
      any |= threads[i].state == state;
    }
    return any;
  };
  const bool backwards = reversed();
  const unsigned warps = (count + 31) / 32;
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned turn = 0; turn < warps; ++turn) {
      const unsigned w = 32 * (backwards ? warps - 1 - turn : turn), end = std::min(w + 32, count);
      for (unsigned step = 0; step < end - w; ++step) {
        const unsigned i = backwards ? end - 1 - step : w + step;
        if (threads[i].state != READY) continue;
        current = i;
        threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
        resume(threads[i]);
        moved = true;
      }
      if (all(w, end, WARP)) {
        for (unsigned i = w; i < end; ++i) {
          taken[i] = given[i];
          if (threads[i].state == WARP) threads[i].state = READY;
        }
        moved = true;
      }
    }
    if (all(0, count, BLOCK)) {
      for (unsigned i = 0; i < count; ++i)
        if (threads[i].state == BLOCK) threads[i].state = READY;
      moved = true;
    }
  }
  for (unsigned i = 0; i < count; ++i)
    if (threads[i].state != DONE) stop_with("a thread waits for others that do not come");
}

inline void run(dim3 blocks, dim3 block, std::function<void()> kernel) {
  const unsigned count = block.x * block.y * block.z;
  if (threads.size() < count) threads.resize(count), given.resize(count), taken.resize(count);
  body = std::move(kernel);
  gridDim = blocks, blockDim = block;
  Shared shared;
  *(volatile char*)&anchor = 0;
  dl_iterate_phdr(find_shared, &shared);
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) {
        blockIdx = dim3(x, y, z);
        if (shared.from) memset(shared.from, 0xff, shared.size);
        run_block(count);
      }
}

// What the warp's lanes hand to each other; each reads the lane `from`.
template <class T>
T exchange(T x, unsigned from) {
  static_assert(sizeof(T) <= 8);
  memcpy(&given[current], &x, sizeof x);
  const unsigned first = current - lane();
  wait(WARP);
  memcpy(&x, &taken[first + from % 32], sizeof x);
  return x;
}

}  // namespace on_cpu

template <class T>
T __shfl_sync(unsigned, T x, int from) {
  return on_cpu::exchange(x, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return on_cpu::exchange(x, on_cpu::lane() ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T x, int by) {
  return on_cpu::exchange(x, on_cpu::lane() + by < 32 ? on_cpu::lane() + by : on_cpu::lane());
}
template <class T>
T __shfl_up_sync(unsigned, T x, int by) {
  return on_cpu::exchange(x, on_cpu::lane() >= unsigned(by) ? on_cpu::lane() - by : on_cpu::lane());
}
inline void __syncwarp(unsigned = ~0u) { on_cpu::exchange(0, 0); }
inline unsigned __ballot_sync(unsigned, bool x) {
  const unsigned first = on_cpu::current - on_cpu::lane();
  on_cpu::exchange(uint64_t(x), 0);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32 && first + i < on_cpu::threads.size(); ++i)
    bits |= unsigned(on_cpu::taken[first + i] & 1) << i;
  return bits;
}
inline bool __any_sync(unsigned m, bool x) { return __ballot_sync(m, x) != 0; }
inline bool __all_sync(unsigned m, bool x) { return __ballot_sync(m, !x) == 0; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
T atomicAdd(T* p, T x) {
  T old = *p;
  *p += x;
  return old;
}
template <class T>
T atomicMax(T* p, T x) {
  T old = *p;
  *p = x > old ? x : old;
  return old;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline uint16_t to_bf16(float x) {  // to the nearest, ties to even
  unsigned bits = __float_as_uint(x);
  return x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fff;
}

// Whether a thread of the block says so. Threads run one at a time: what they add up needs barriers alone.
inline int __syncthreads_or(int x) {
  static int said;
  said |= x != 0;
  __syncthreads();
  const int any = said;
  __syncthreads();
  said = 0;
  __syncthreads();
  return any;
}

// The instructions of tensor cores, by the layout that PTX's manual gives for them.
//
// ldmatrix .x4: four matrices of 8 x 8 numbers of two bytes. Lanes 8 i .. 8 i + 7 hold where the rows of
// matrix i begin; lane l gets of each row l / 4, numbers 2 (l % 4) and the next; transposed: of each
// column l / 4.
template <bool TRANSPOSED>
void load_matrices(uint32_t (&x)[4], const void* row) {
  if (uintptr_t(row) % 16) stop_with("a row of a matrix does not begin at 16 aligned bytes");
  const unsigned lane = on_cpu::lane();
  for (unsigned i = 0; i < 4; ++i) {
    const auto number = [&](unsigned r, unsigned c) {
      return uint32_t(((const uint16_t*)on_cpu::exchange(row, 8 * i + r))[c]);
    };
    const unsigned a = lane / 4, b = lane % 4 * 2;
    const uint32_t first = TRANSPOSED ? number(b, a) : number(a, b),
                   next = TRANSPOSED ? number(b + 1, a) : number(a, b + 1);
    x[i] = first | next << 16;
  }
}

// mma m16n8k16, bfloat16 into float32: lane l holds of a [16,16] rows l / 4 (+ 8) and columns 2 (l % 4)
// (+ 8) and the next, of b [16,8] column l / 4, of the sums [16,8] rows l / 4 (+ 8) and columns 2 (l %
// 4) and the next.
inline void multiply_16_8_16(float& s0, float& s1, float& s2, float& s3, const uint32_t (&a)[4], uint32_t b0,
                             uint32_t b1) {
  const unsigned lane = on_cpu::lane(), first = on_cpu::current - lane;
  uint64_t words[3][32];
  const uint64_t own[3] = {a[0] | uint64_t(a[1]) << 32, a[2] | uint64_t(a[3]) << 32, b0 | uint64_t(b1) << 32};
  for (int w = 0; w < 3; ++w) {
    on_cpu::exchange(own[w], 0);
    memcpy(words[w], &on_cpu::taken[first], sizeof words[w]);
  }
  const auto wide = [](uint64_t word, unsigned n) {
    return __uint_as_float(uint32_t(word >> 16 * n & 0xffff) << 16);
  };
  const auto in_a = [&](unsigned r, unsigned k) {
    return wide(words[k / 8][r % 8 * 4 + k % 8 / 2], r / 8 * 2 + k % 2);
  };
  const auto in_b = [&](unsigned k, unsigned c) {
    return wide(words[2][c * 4 + k % 8 / 2], k / 8 * 2 + k % 2);
  };
  float* sums[4] = {&s0, &s1, &s2, &s3};
  for (unsigned e = 0; e < 4; ++e)
    for (unsigned k = 0; k < 16; ++k)
      *sums[e] += in_a(lane / 4 + e / 2 * 8, k) * in_b(k, lane % 4 * 2 + e % 2);
}
