// Products of few rows, as in generation: up to FEW rows of x times weights that are far larger than the cache.
//
// What bounds them is reading the weights once, and a general matrix product, made for many rows, does that far below
// the rate of memory. Here all rows of x meet a weight while it is in a register or in L1, and weights are read in long
// stretches, a few side by side. What is added up, and in which order, depends on K alone, not on threads or on the
// other rows.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "interface.h"
#include "microkernel.h"
#include "simd.h"
#include "tasks.h"

using namespace minigpt2;

namespace {

constexpr int FEW = 8;
constexpr int CHUNKS = 8;         // into which the rows of w are cut, each with sums of its own
constexpr int STREAMS = 8;        // rows of w read side by side
constexpr int ROWS_A_TASK = 128;  // of a transposed w

// out (M x N) = bias + x w, for w (K x N); N is a multiple of two vectors.
template <int M>
void few_rows(int64_t K, int64_t N, const float* x, int64_t x_stride, const float* w, const float* bias, float* out) {
  constexpr int n = LANES<float>, NV = M > 4 ? 1 : 2, panel = NV * n, panels_a_task = 8;
  const int64_t chunk = round_up((K + CHUNKS - 1) / CHUNKS, STREAMS), chunks = (K + chunk - 1) / chunk;
  const int64_t panels = N / panel;
  scratch.reserve(sizeof(float) * M * (K + 16 + chunks * N));
  float* columns = scratch.take<float>(M * K);           // x transposed: K x M
  float* partial = scratch.take<float>(chunks * M * N);  // of each chunk, panel by panel, M rows in each
  for_each_task(chunks, [&](int64_t task) {
    const int64_t first = task * chunk, end = std::min(K, first + chunk);
    for (int64_t k = first; k < end; k++)
      for (int i = 0; i < M; i++) columns[k * M + i] = x[i * x_stride + k];
    for (int64_t begin = first; begin < end; begin += STREAMS) {
      const int64_t stop = std::min(end, begin + STREAMS);
      float* to = partial + task * M * N;
      for (int64_t column = 0; column < N; column += panel) {
        Vec<float> sum[M][NV] = {};
        for (int64_t k = begin; k < stop; k++)
          multiply_add<float, M, NV, Walk::keys, 0, M>(sum, columns + k * M, 0, w + k * N + column);
        UNROLL for (int i = 0; i < M; i++)
          UNROLL for (int v = 0; v < NV; v++, to += n) store(to, begin == first ? sum[i][v] : load(to) + sum[i][v]);
      }
    }
  });
  for_each_task((panels + panels_a_task - 1) / panels_a_task, [&](int64_t task) {
    for (int64_t p = task * panels_a_task; p < std::min(panels, (task + 1) * panels_a_task); p++)
      for (int i = 0; i < M; i++)
        for (int v = 0; v < panel; v += n) {
          Vec<float> sum = load(bias + p * panel + v);
          for (int64_t c = 0; c < chunks; c++) sum += load(partial + c * M * N + (p * M + i) * panel + v);
          store(out + i * N + p * panel + v, sum);
        }
  });
}

// out (M x N) = x w^T, for w (N x K); K is a multiple of a vector.
template <int M>
void few_rows_transposed(int64_t K, int64_t N, const float* x, int64_t x_stride, const float* w, float* out) {
  constexpr int n = LANES<float>, R = std::max(1, 4 / M);  // rows of w at a time
  const int64_t stride = K + 16;  // a multiple of the page size would make all rows compete for the same cache lines
  scratch.reserve(sizeof(float) * M * stride);
  float* rows = scratch.take<float>(M * stride);
  for (int i = 0; i < M; i++) std::memcpy(rows + i * stride, x + i * x_stride, sizeof(float) * K);
  for_each_task((N + ROWS_A_TASK - 1) / ROWS_A_TASK, [&](int64_t task) {
    const int64_t end = std::min(N, (task + 1) * ROWS_A_TASK);
    for (int64_t row = task * ROWS_A_TASK; row < end; row += R) {
      const float* from[R];
      UNROLL for (int j = 0; j < R; j++) from[j] = w + std::min(row + j, end - 1) * K;
      Vec<float> sum[M][R] = {};
      for (int64_t k = 0; k < K; k += n) {
        Vec<float> weight[R];
        UNROLL for (int j = 0; j < R; j++) weight[j] = load(from[j] + k);
        UNROLL for (int i = 0; i < M; i++) {
          const Vec<float> a = load(rows + i * stride + k);
          UNROLL for (int j = 0; j < R; j++) sum[i][j] += a * weight[j];
        }
      }
      UNROLL for (int i = 0; i < M; i++)
        UNROLL for (int j = 0; j < R; j++) out[i * N + std::min(row + j, end - 1)] = sum_lanes<float>(sum[i][j]);
    }
  });
}

// Calls f(M) with M as a constant expression.
template <class F, size_t... i> void with_rows(int64_t M, const F& f, std::index_sequence<i...>) {
  ((M == int64_t(i) + 1 ? f(std::integral_constant<int, int(i) + 1>{}) : void()), ...);
}

}  // namespace

// Everything is float32. weights are contiguous: (K, N) with a bias, (N, K) without one. M is from 1 to FEW, K not 0.
EXPORT int minigpt2_few_rows(int64_t M, int64_t K, int64_t N, const float* x, int64_t x_stride, const float* weights,
                             const float* bias, float* out) {
  return dispatch(0, [&]<class S, class A>() {
    auto run = [&](auto m) {
      if (bias) few_rows<m()>(K, N, x, x_stride, weights, bias, out);
      else few_rows_transposed<m()>(K, N, x, x_stride, weights, out);
    };
    with_rows(M, run, std::make_index_sequence<FEW>{});
  });
}
