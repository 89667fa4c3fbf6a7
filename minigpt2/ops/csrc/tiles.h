// Matrix products of pairs on AMX, a processor's unit for tiles: matrices of 16 rows of 64 bytes in registers, of which
// one instruction multiplies two, 16 x 16 pairs each, and adds the product to a third, of 16 x 16 floats. Vectors of
// pairs do a sixteenth of that in the time. How sums round is up to the unit, and the same in every run.
//
// There are eight such registers, and a product of 2 x 2 tiles of sums would read the fewest tiles from memory. But
// then all eight are in use, and on the virtual Xeons that this was measured on loads and products do not overlap for a
// good part of the time. Quartiles of many short runs, in billions of operations a second and thread
// (tests/ops/tile_registers.cpp):
//
//   sums x registers in use  2 x 2, 8  2 x 2, 7  1 x 4, 6  1 x 3, 5  1 x 2, 4
//   first quartile                571       794       901       972      1016
//   third quartile               2429      2473      2499      2290      2047
//
// What decides is probably whether the core's other thread, which may be another's machine, has tiles too: registers to
// rename them to are few. So attention takes 1 x 2 and the products of training (matmul.cpp) 1 x 3.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "microkernel.h"
#include "operand.h"
#include "simd.h"

// Clang spelled them __AMXTILE__ and __AMXBF16__ at first.
#if (defined(__AMX_TILE__) || defined(__AMXTILE__)) && (defined(__AMX_BF16__) || defined(__AMXBF16__)) && \
    defined(__AVX512BF16__) && defined(__linux__)
#define MINIGPT2_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace minigpt2 {

constexpr int BLOCK = 32;  // of which rows and columns of a product are multiples

#ifdef MINIGPT2_TILES
constexpr bool TILES = true;

// Whether this process may use tiles, which Linux grants to those that ask (docs.kernel.org: arch/x86/xstate).
inline bool tiles_usable() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
}

// While one lives, all tiles of this thread are of 16 rows of 64 bytes.
struct Tiles {
  Tiles() {
    struct alignas(64) { uint8_t palette = 1, rest[15] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } shape;
    for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = 64, shape.rows[tile] = 16;
    std::atomic_signal_fence(std::memory_order_seq_cst);
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

// c (16 x BLOCK) = a b, or c += a b with `add`. a lies along its rows, b across them; words: of the dimension that is
// summed over, a multiple of 16. Strides count words and floats.
INLINE void strip_of_tiles(float* c, ptrdiff_t ldc, const Pair* a, ptrdiff_t lda, const Pair* b, ptrdiff_t ldb,
                           int words, bool add) {
  const ptrdiff_t c_bytes = 4 * ldc, a_bytes = 4 * lda, b_bytes = 4 * ldb;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int k = 0; k < words; k += 16) {
    _tile_loadd(2, a + k, a_bytes);
    _tile_loadd(3, b + k * ldb, b_bytes);
    _tile_dpbf16ps(0, 2, 3);
    _tile_loadd(3, b + k * ldb + 16, b_bytes);
    _tile_dpbf16ps(1, 2, 3);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
}

// The same of any number of rows and columns, c (rows x columns).
inline void tile_product(float* c, ptrdiff_t ldc, const Pair* a, ptrdiff_t lda, const Pair* b, ptrdiff_t ldb, int rows,
                         int columns, int words, bool add) {
  std::atomic_signal_fence(std::memory_order_seq_cst);  // a compiler need not know that tiles are loaded from memory
  for (int j = 0; j < columns; j += BLOCK)
    for (int i = 0; i < rows; i += 16)
      strip_of_tiles(c + i * ldc + j, ldc, a + i * lda, lda, b + j, ldb, words, add);
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

#else
constexpr bool TILES = false;

inline bool tiles_usable() { return false; }
struct Tiles {};
inline void tile_product(float*, ptrdiff_t, const Pair*, ptrdiff_t, const Pair*, ptrdiff_t, int, int, int, bool) {}

#endif

// Calls f with whether it is to multiply words of W by tiles, as a constant: f(std::true_type) or f(std::false_type).
// D: numbers in a head.
template <class W, class F> void with_tiles(int D, const F& f) {
  if constexpr (TILES && DEPTH<W> == 2) {
    if (D % BLOCK == 0 && tiles_usable()) {
      [[maybe_unused]] const Tiles shaped;
      return f(std::true_type{});
    }
  }
  return f(std::false_type{});
}

// R rows: c (R x columns) = a b.
template <class W, int R, bool tiles, class A = Sum<W>>
INLINE void whole_product(A* c, ptrdiff_t ldc, const W* a, ptrdiff_t lda, const W* b, ptrdiff_t ldb, int columns,
                          int words) {
  if constexpr (tiles) tile_product(c, ldc, a, lda, b, ldb, R, columns, words, false);
  else strip_product<W, R, Walk::rows>(c, ldc, a, lda, b, ldb, columns, words, BELOW, Into::empty);
}

// R rows: c gets a b, of which row i sees k <= diagonal + i. Tiles multiply what it does not see too, where a is to be
// 0: that is the same but for what is not finite in b. With `exact`, strips of two rows leave out what is not seen.
template <class W, int R, bool tiles, class A = Sum<W>>
INLINE void seen_product(A* c, ptrdiff_t ldc, const W* a, ptrdiff_t lda, const W* b, ptrdiff_t ldb, int columns,
                         int words, int diagonal, Into into, const std::type_identity_t<A>* factor, bool exact) {
  if constexpr (!tiles) {
    strip_product<W, R, Walk::rows>(c, ldc, a, lda, b, ldb, columns, words, diagonal, into, factor);
  } else if (exact) {
    for (int i = 0; i < R; i += 2)
      strip_product<W, 2, Walk::rows>(c + i * ldc, ldc, a + i * lda, lda, b, ldb, columns, words, diagonal + i, into,
                                      factor ? factor + i : nullptr);
  } else {
    if (into == Into::rescaled)
      for (int i = 0; i < R; i++)
        for (int j = 0; j < columns; j += LANES<A>) store(c + i * ldc + j, load(c + i * ldc + j) * factor[i]);
    tile_product(c, ldc, a, lda, b, ldb, R, columns, words, into != Into::empty);
  }
}

// c (D x columns) += a b, a (D x rows) along, b (rows x columns) across. Row i of b is 0 after column diagonal + i;
// with `exact` it is not even multiplied there.
inline void turned_product(float* c, const Pair* a, ptrdiff_t lda, const Pair* b, int D, int columns, int rows,
                           int diagonal, bool exact) {
  if (!exact) return tile_product(c, columns, a, lda, b, columns, D, columns, rows / 2, true);
  auto number = [](Pair pair, int which) {
    const uint32_t bits = which ? pair.bits & 0xffff0000 : pair.bits << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  for (int d = 0; d < D; d++)
    for (int j = 0; j < columns; j++) {
      float sum = 0;
      for (int i = std::max(0, j - diagonal); i < rows; i++)
        sum += number(a[d * lda + i / 2], i % 2) * number(b[i / 2 * columns + j], i % 2);
      c[d * columns + j] += sum;
    }
}

}  // namespace minigpt2
