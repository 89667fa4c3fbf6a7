// Products of few rows, as in generation: up to FEW rows of x times weights that are far larger than the cache.
//
// What bounds them is reading the weights once, and a general matrix product, made for many rows, does that far below
// the rate of memory. Here all rows of x meet a weight while it is in a register or in L1, and weights are read in long
// stretches, a few side by side, each asked for before it is needed: stretches are too short for the processor to see
// them coming. What is added up, and in which order, depends on K alone, not on threads or on the other rows. Weights
// and rows in bfloat16 are half the bytes to read; they are widened in registers, and sums are float32.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "interface.h"
#include "simd.h"
#include "tasks.h"

using namespace minigpt2;

namespace {

constexpr int FEW = 8;
constexpr int CHUNKS = 4;         // into which the rows of w are cut, each with sums of its own; more threads share one
constexpr int STREAMS = 16;       // rows of w read side by side
constexpr int ROWS_A_TASK = 128;  // of a transposed w
constexpr int SUMS = REGISTERS / 2;  // vectors of them that stay in registers

// Asks for what will be read, so far ahead that L1 would have lost it again by then: into L2.
template <int bytes> INLINE void prefetch(const void* p) {
  UNROLL for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

template <class A> INLINE A element(A x) { return x; }
INLINE float element(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class A> INLINE void assign(A& to, A x) { to = x; }
INLINE void assign(BFloat16& to, float x) {
  BFloat16 lanes[LANES<float>];
  store_as<float>(lanes, splat(x));
  to = lanes[0];
}

// out (M x N) = bias + x w, for w (K x N); N is a multiple of two vectors.
template <int M, class S, class A>
void few_rows(int64_t K, int64_t N, const S* x, int64_t x_stride, const S* w, const S* bias, S* out) {
  constexpr int n = LANES<A>, NV = M > 4 && REGISTERS < 32 ? 1 : 2, panel = NV * n, panels_a_task = 8;
  const int64_t chunk = round_up((K + CHUNKS - 1) / CHUNKS, STREAMS), chunks = (K + chunk - 1) / chunk;
  const int64_t panels = N / panel, groups = std::min((2 * thread_count() + chunks - 1) / chunks, panels);
  scratch.reserve(sizeof(A) * M * (groups * (K + 16 * chunks) + 16 + chunks * N));
  A* columns = scratch.take<A>(groups * M * (K + 16 * chunks));  // of each task, its chunk of x, transposed
  A* partial = scratch.take<A>(chunks * M * N);                  // of each chunk, panel by panel, M rows in each
  for_each_task(chunks * groups, [&](int64_t task) {
    const int64_t part = task / groups, group = task % groups;  // of the chunks, and of the panels
    const int64_t first = part * chunk, end = std::min(K, first + chunk);
    A* column = columns + task * M * chunk;
    for (int64_t k = first; k < end; k++)
      for (int i = 0; i < M; i++) column[(k - first) * M + i] = element(x[i * x_stride + k]);
    for (int64_t begin = first; begin < end; begin += STREAMS) {
      const int64_t stop = std::min(end, begin + STREAMS);
      for (int64_t p = panels * group / groups; p < panels * (group + 1) / groups; p++) {
        Vec<A> sum[M][NV] = {};
        for (int64_t k = begin; k < stop; k++) {
          const S* from = w + k * N + p * panel;
          Vec<A> row[NV];
          UNROLL for (int v = 0; v < NV; v++) row[v] = load_as<A>(from + v * n);
          prefetch<panel * sizeof(S)>(from + STREAMS * N);
          UNROLL for (int i = 0; i < M; i++)
            UNROLL for (int v = 0; v < NV; v++) sum[i][v] += column[(k - first) * M + i] * row[v];
        }
        A* to = partial + (part * panels + p) * M * panel;
        UNROLL for (int i = 0; i < M; i++)
          UNROLL for (int v = 0; v < NV; v++, to += n)
            store(to, begin == first ? sum[i][v] : load(to) + sum[i][v]);
      }
    }
  });
  for_each_task((panels + panels_a_task - 1) / panels_a_task, [&](int64_t task) {
    for (int64_t p = task * panels_a_task; p < std::min(panels, (task + 1) * panels_a_task); p++)
      for (int i = 0; i < M; i++)
        for (int v = 0; v < panel; v += n) {
          Vec<A> sum = load_as<A>(bias + p * panel + v);
          for (int64_t c = 0; c < chunks; c++) sum += load(partial + c * M * N + (p * M + i) * panel + v);
          store_as<A>(out + i * N + p * panel + v, sum);
        }
  });
}

// out (M x N) = x w^T, for w (N x K); K is a multiple of a vector.
template <int M, class S, class A>
void few_rows_transposed(int64_t K, int64_t N, const S* x, int64_t x_stride, const S* w, S* out) {
  constexpr int n = LANES<A>, R = std::clamp(SUMS / M, 1, 4);  // rows of w at a time
  const int64_t stride = K + 16;  // a multiple of the page size would make all rows compete for the same cache lines
  scratch.reserve(sizeof(A) * M * stride);
  A* rows = scratch.take<A>(M * stride);
  for (int i = 0; i < M; i++)
    for (int64_t k = 0; k < K; k += n) store(rows + i * stride + k, load_as<A>(x + i * x_stride + k));
  for_each_task((N + ROWS_A_TASK - 1) / ROWS_A_TASK, [&](int64_t task) {
    const int64_t end = std::min(N, (task + 1) * ROWS_A_TASK);
    for (int64_t row = task * ROWS_A_TASK; row < end; row += R) {
      const S* from[R];
      UNROLL for (int j = 0; j < R; j++) from[j] = w + std::min(row + j, end - 1) * K;
      Vec<A> sum[M][R] = {};
      for (int64_t k = 0; k < K; k += n) {
        Vec<A> weight[R];
        UNROLL for (int j = 0; j < R; j++) {
          weight[j] = load_as<A>(from[j] + k);
          prefetch<n * sizeof(S)>(from[j] + R * K + k);
        }
        UNROLL for (int i = 0; i < M; i++) {
          const Vec<A> a = load(rows + i * stride + k);
          UNROLL for (int j = 0; j < R; j++) sum[i][j] += a * weight[j];
        }
      }
      UNROLL for (int i = 0; i < M; i++)
        UNROLL for (int j = 0; j < R; j++) assign(out[i * N + std::min(row + j, end - 1)], sum_lanes<A>(sum[i][j]));
    }
  });
}

// Calls f(M) with M as a constant expression.
template <class F, size_t... i> void with_rows(int64_t M, const F& f, std::index_sequence<i...>) {
  ((M == int64_t(i) + 1 ? f(std::integral_constant<int, int(i) + 1>{}) : void()), ...);
}

}  // namespace

// All tensors are of one dtype. weights are contiguous: (K, N) with a bias, (N, K) without one. M is from 1 to FEW, K not
// 0.
EXPORT int minigpt2_few_rows(int dtype, int64_t M, int64_t K, int64_t N, const void* x, int64_t x_stride,
                             const void* weights, const void* bias, void* out) {
  return dispatch(dtype, [&]<class S, class A>() {
    auto run = [&](auto m) {
      const auto from = static_cast<const S*>(x), w = static_cast<const S*>(weights), b = static_cast<const S*>(bias);
      if (bias) few_rows<m(), S, A>(K, N, from, x_stride, w, b, static_cast<S*>(out));
      else few_rows_transposed<m(), S, A>(K, N, from, x_stride, w, static_cast<S*>(out));
    };
    with_rows(M, run, std::make_index_sequence<FEW>{});
  });
}
