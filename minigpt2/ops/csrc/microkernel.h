// The micro-kernel: a strip of a matrix product, of a few rows and a few vectors of columns, that stays in registers.
//
// Every product of attention is made of such strips; a product of few rows (products.cpp) uses its innermost step.

#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace minigpt2 {

constexpr int ROWS = 6;  // of a strip
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int PANEL = 4;  // vectors of columns of a strip. 32 registers: 6 x 4 sums, 4 loads, 1 broadcast
#else
constexpr int PANEL = 2;  // vectors of columns of a strip. 16 registers: 6 x 2 sums, 2 loads, 1 broadcast
#endif

// One strip of c += a b: R rows, NV vectors of columns, k from 0 to n. Pairs (row i, k) on the wrong side of the
// diagonal are left out:
//   Walk::rows  a is rows of scores (i: query, k: key), (i, k) at a[i * lda + k]; i sees k <= diagonal + i
//   Walk::keys  a is columns of scores (i: key, k: query), (i, k) at a[k * lda + i]; i is seen by k >= diagonal + i
enum class Walk { rows, keys };

template <class A, int R, int NV, Walk walk, int first, int last>
INLINE void multiply_add(Vec<A> (&c)[R][NV], const A* a, ptrdiff_t lda, const A* b) {
  Vec<A> row[NV];
  UNROLL for (int v = 0; v < NV; v++) row[v] = load(b + v * LANES<A>);
  UNROLL for (int i = first; i < last; i++) {
    const A x = walk == Walk::rows ? a[i * lda] : a[i];
    UNROLL for (int v = 0; v < NV; v++) c[i][v] += x * row[v];
  }
}

template <class A, int R, int NV, Walk walk, size_t... t>
INLINE void product(Vec<A> (&c)[R][NV], const A* a, ptrdiff_t lda, const A* b, ptrdiff_t ldb, int n, int diagonal,
                    std::index_sequence<t...>) {
  const ptrdiff_t step = walk == Walk::rows ? 1 : lda;
  auto corner = [&](auto from, auto to, int k) {
    if (k >= 0 && k < n) multiply_add<A, R, NV, walk, from(), to()>(c, a + k * step, lda, b + k * ldb);
  };
  int begin = 0, end = n;
  if constexpr (walk == Walk::keys) {
    (corner(std::integral_constant<int, 0>{}, std::integral_constant<int, int(t) + 1>{}, diagonal + int(t)), ...);
    begin = std::clamp(diagonal + R - 1, 0, n);
  } else {
    end = std::clamp(diagonal + 1, 0, n);
  }
  for (int k = begin; k < end; k++) multiply_add<A, R, NV, walk, 0, R>(c, a + k * step, lda, b + k * ldb);
  if constexpr (walk == Walk::rows) {
    (corner(std::integral_constant<int, int(t) + 1>{}, std::integral_constant<int, R>{}, diagonal + int(t) + 1), ...);
  }
}

enum class Into { empty, sum, rescaled };  // the result replaces c, is added to it, or to c times a factor for each row

// A tile's sum starts from zero and is added to c as a whole: the rounding errors of one long chain of additions would
// grow with T.
template <class A, int R, int NV, Walk walk>
void product_panel(A* c, ptrdiff_t ldc, const A* a, ptrdiff_t lda, const A* b, ptrdiff_t ldb, int n, int diagonal,
                   Into into, const A* factor) {
  Vec<A> sum[R][NV];
  UNROLL for (int i = 0; i < R; i++)
    UNROLL for (int v = 0; v < NV; v++) sum[i][v] = Vec<A>{};
  product<A, R, NV, walk>(sum, a, lda, b, ldb, n, diagonal, std::make_index_sequence<R - 1>{});
  UNROLL for (int i = 0; i < R; i++)
    UNROLL for (int v = 0; v < NV; v++) {
      A* to = c + i * ldc + v * LANES<A>;
      if (into == Into::sum) sum[i][v] += load(to);
      if (into == Into::rescaled) sum[i][v] += load(to) * factor[i];
      store(to, sum[i][v]);
    }
}

constexpr int BELOW = 1 << 20;  // a diagonal that leaves nothing out of a Walk::rows product

// c (R x columns) gets a b. columns is a multiple of the lanes of a vector.
template <class A, int R, Walk walk>
INLINE void strip_product(A* c, ptrdiff_t ldc, const A* a, ptrdiff_t lda, const A* b, ptrdiff_t ldb, int columns, int n,
                          int diagonal, Into into, const A* factor = nullptr) {
  constexpr int panel = PANEL * LANES<A>;
  int column = 0;
  for (; column + panel <= columns; column += panel)
    product_panel<A, R, PANEL, walk>(c + column, ldc, a, lda, b + column, ldb, n, diagonal, into, factor);
  auto narrow = [&](auto vectors) {
    if constexpr (vectors() < PANEL)
      product_panel<A, R, vectors(), walk>(c + column, ldc, a, lda, b + column, ldb, n, diagonal, into, factor);
  };
  switch ((columns - column) / LANES<A>) {
    case 3: narrow(std::integral_constant<int, 3>{}); break;
    case 2: narrow(std::integral_constant<int, 2>{}); break;
    case 1: narrow(std::integral_constant<int, 1>{}); break;
  }
}

}  // namespace minigpt2
