// The micro-kernel: a strip of a matrix product, of a few rows and a few vectors of columns, that stays in registers.
//
// Every product of attention is made of such strips, but where a processor has better (tiles.h).

#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "operand.h"
#include "simd.h"

namespace minigpt2 {

constexpr int ROWS = 6;  // of a strip
constexpr int PANEL = REGISTERS / 8;  // vectors of columns of a strip: 6 sums and a load each, beside a broadcast

// One strip of c += a b: R rows, NV vectors of columns, n words in the dimension k that is summed over. b lies across
// its rows. Products (row i, k) on the wrong side of the diagonal are left out; k counts numbers, not words:
//   Walk::rows  a is rows of scores (i: query, k: key) and lies along them, (i, k) in a[i * lda + k / DEPTH];
//               i sees k <= diagonal + i
//   Walk::keys  a is columns of scores (i: key, k: query) and lies across its rows, (i, k) in a[k / DEPTH * lda + i];
//               i is seen by k >= diagonal + i
// The diagonal and R are multiples of DEPTH: a word straddles the diagonal in one row only.
enum class Walk { rows, keys };

template <class W, int R, int NV, Walk walk, int first, int last>
INLINE void multiply_add(Vec<Sum<W>> (&c)[R][NV], const W* a, ptrdiff_t lda, const W* b) {
  Vec<W> row[NV];
  UNROLL for (int v = 0; v < NV; v++) row[v] = load(b + v * LANES<W>);
  UNROLL for (int i = first; i < last; i++) {
    const W x = walk == Walk::rows ? a[i * lda] : a[i];
    UNROLL for (int v = 0; v < NV; v++) c[i][v] = add_product(c[i][v], x, row[v]);
  }
}

// The same for row i alone, which sees one number of a pair. The other may be anything, in a and in b.
template <int i, int R, int NV, Walk walk>
INLINE void multiply_add_half(Vec<float> (&c)[R][NV], const Pair* a, ptrdiff_t lda, const Pair* b) {
  constexpr uint32_t seen = walk == Walk::rows ? 0xffff : 0xffff0000;
  const Pair x{(walk == Walk::rows ? a[i * lda] : a[i]).bits & seen};
  UNROLL for (int v = 0; v < NV; v++) c[i][v] = add_product(c[i][v], x, load(b + v * LANES<Pair>) & seen);
}

template <class W, int R, int NV, Walk walk, size_t... t>
INLINE void product(Vec<Sum<W>> (&c)[R][NV], const W* a, ptrdiff_t lda, const W* b, ptrdiff_t ldb, int n, int diagonal,
                    std::index_sequence<t...>) {
  constexpr int depth = DEPTH<W>;
  const ptrdiff_t step = walk == Walk::rows ? 1 : lda;
  const int on_diagonal = diagonal / depth;  // the first word that the diagonal cuts
  auto corner = [&](auto number) {
    constexpr int i = number() * depth, first = walk == Walk::rows ? i + depth - 1 : 0,
                  last = walk == Walk::rows ? R : i + 1;
    const int k = on_diagonal + number();
    if (k < 0 || k >= n) return;
    multiply_add<W, R, NV, walk, first, last>(c, a + k * step, lda, b + k * ldb);
    if constexpr (depth == 2)
      multiply_add_half<walk == Walk::rows ? i : i + 1, R, NV, walk>(c, a + k * step, lda, b + k * ldb);
  };
  int begin = 0, end = n;
  if constexpr (walk == Walk::keys) {
    (corner(std::integral_constant<int, int(t)>{}), ...);
    begin = std::clamp(on_diagonal + R / depth, 0, n);
  } else {
    end = std::clamp(on_diagonal, 0, n);
  }
  for (int k = begin; k < end; k++) multiply_add<W, R, NV, walk, 0, R>(c, a + k * step, lda, b + k * ldb);
  if constexpr (walk == Walk::rows) (corner(std::integral_constant<int, int(t)>{}), ...);
}

enum class Into { empty, sum, rescaled };  // the result replaces c, is added to it, or to c times a factor for each row

// A tile's sum starts from zero and is added to c as a whole: the rounding errors of one long chain of additions would
// grow with T.
template <class W, int R, int NV, Walk walk, class A = Sum<W>>
void product_panel(A* c, ptrdiff_t ldc, const W* a, ptrdiff_t lda, const W* b, ptrdiff_t ldb, int n, int diagonal,
                   Into into, const A* factor) {
  Vec<A> sum[R][NV];
  UNROLL for (int i = 0; i < R; i++)
    UNROLL for (int v = 0; v < NV; v++) sum[i][v] = Vec<A>{};
  product<W, R, NV, walk>(sum, a, lda, b, ldb, n, diagonal, std::make_index_sequence<R / DEPTH<W>>{});
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
template <class W, int R, Walk walk, class A = Sum<W>>
INLINE void strip_product(A* c, ptrdiff_t ldc, const W* a, ptrdiff_t lda, const W* b, ptrdiff_t ldb, int columns, int n,
                          int diagonal, Into into, const A* factor = nullptr) {
  constexpr int panel = PANEL * LANES<A>;
  int column = 0;
  for (; column + panel <= columns; column += panel)
    product_panel<W, R, PANEL, walk>(c + column, ldc, a, lda, b + column, ldb, n, diagonal, into, factor);
  auto narrow = [&](auto vectors) {
    if constexpr (vectors() < PANEL)
      product_panel<W, R, vectors(), walk>(c + column, ldc, a, lda, b + column, ldb, n, diagonal, into, factor);
  };
  switch ((columns - column) / LANES<A>) {
    case 3: narrow(std::integral_constant<int, 3>{}); break;
    case 2: narrow(std::integral_constant<int, 2>{}); break;
    case 1: narrow(std::integral_constant<int, 1>{}); break;
  }
}

}  // namespace minigpt2
