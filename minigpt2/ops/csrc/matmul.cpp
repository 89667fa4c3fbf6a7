// Matrix products of training on AMX (tiles.h): out = a b, of bfloat16, with sums in float32.
//
// Both factors are first copied into tiles, as the unit reads them, whichever way they lay before; that is also where
// a float32 weight becomes bfloat16. All threads copy a piece of the smaller factor, which stays in the cache. Then
// each takes strips of the other, copies one, and multiplies it with the whole piece: so the multiplications read no
// memory beyond L2 but the piece, and of that 24 KiB from L1. What is added up, and in which order, depends on K alone,
// and on whether the product is rounded: sums that are not are cut into pieces of K, which are added in memory.
//
//   a (M x K): panels of 16 rows, K / 32 tiles of 16 rows x 16 pairs
//   b (K x N): panels of 48 columns, K / 32 times three tiles of 16 pairs x 16 columns

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "interface.h"
#include "operand.h"
#include "simd.h"
#include "tasks.h"
#include "tiles.h"

using namespace minigpt2;

#ifdef MINIGPT2_TILES

namespace {

constexpr int SIDE = 16, TILE = SIDE * SIDE;  // lines of a tile, and its words
constexpr int DEPTH_OF_TILE = 2 * SIDE;       // numbers, of the dimension that is summed over
constexpr int WIDE = 3, COLUMNS = WIDE * SIDE;  // tiles of a panel of b, side by side, and their columns
constexpr int64_t NEAR = 8;                   // tiles of depth that stay in L1, of a panel of b
constexpr int64_t DEEPEST = 3072;             // numbers of depth, of a piece
constexpr int64_t PIECE = 5 << 19;            // the most numbers of one: 5 MiB of the last cache
constexpr int64_t STRIP = 3 << 17;            // and of a strip: 768 KiB of L2
constexpr int64_t SHORTEST = 64;              // lines of a strip

// a or b, which may lie in memory as its transpose.
struct Factor {
  const void* at;
  int64_t stride, rows, columns;  // of what lies in memory
  bool by_depth;                  // whether a row in memory is of one depth, or is a row of a or column of b
  int64_t lines, unit;            // rows of a or columns of b, rounded up; how many of them a panel has
  void (*copy)(const Factor& from, Pair* to, int64_t begin, int64_t end, int64_t k, int64_t first, int64_t last,
               int64_t deep);
};

int64_t up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

INLINE Vec<Pair> along(const BFloat16* row) { return load_along<Pair>(row, LANES<Pair>); }
INLINE Vec<Pair> along(const float* row) {
  return (Vec<Pair>)_mm512_cvtne2ps_pbh((__m512)load(row + SIDE), (__m512)load(row));
}
INLINE Vec<Pair> across(const BFloat16* row, const BFloat16* next) { return load_across<Pair>(row, next); }
INLINE Vec<Pair> across(const float* row, const float* next) {
  Pair pairs[SIDE];
  const Vec<float> rows[2] = {load(row), load(next)};
  store_across(pairs, rows);
  return load(pairs);
}

// A tile of a has 16 rows of 16 pairs along them, one of b 16 rows of pairs across two rows of it. `turned`: of the
// transpose of what lies in memory.
template <bool of_b, bool turned, class S> INLINE void copy_tile(Pair* to, const S* from, int64_t stride) {
  Vec<Pair> square[SIDE];
  UNROLL for (int i = 0; i < SIDE; i++) {
    if constexpr (of_b == turned) square[i] = along(from + i * stride);
    else square[i] = across(from + 2 * i * stride, from + (2 * i + 1) * stride);
  }
  if constexpr (turned) transpose<Pair>(square);
  UNROLL for (int i = 0; i < SIDE; i++) store(to + i * SIDE, square[i]);
}

// Panels of the lines from `begin` to `end`, their tiles from `first` to `last` of the `deep` that there are after k
// numbers. Beyond a factor are zeros.
template <bool of_b, bool turned, class S>
void copy_panels(const Factor& m, Pair* to, int64_t begin, int64_t end, int64_t k, int64_t first, int64_t last,
                 int64_t deep) {
  constexpr bool by_depth = of_b != turned;
  constexpr int wide = of_b ? WIDE : 1;
  constexpr int height = by_depth ? DEPTH_OF_TILE : SIDE, width = by_depth ? SIDE : DEPTH_OF_TILE;
  auto copy = [&](int64_t tile, int64_t i) {
    Pair* const at = to + ((tile / wide * deep + i) * wide + tile % wide) * TILE;
    const int64_t depth = k + i * DEPTH_OF_TILE, line = begin + tile * SIDE;
    const int64_t row = by_depth ? depth : line, column = by_depth ? line : depth;
    const S* const from = static_cast<const S*>(m.at) + row * m.stride + column;
    if (row + height <= m.rows && column + width <= m.columns) return copy_tile<of_b, turned>(at, from, m.stride);
    S whole[height][width] = {};
    for (int64_t j = 0; j < std::min<int64_t>(height, m.rows - row); j++)
      std::memcpy(whole[j], from + j * m.stride, sizeof(S) * std::clamp<int64_t>(m.columns - column, 0, width));
    copy_tile<of_b, turned>(at, whole[0], width);
  };
  const int64_t tiles = (end - begin) / SIDE;
  if constexpr (by_depth) {  // memory is read along its rows
    for (int64_t i = first; i < last; i++)
      for (int64_t tile = 0; tile < tiles; tile++) copy(tile, i);
  } else {
    for (int64_t tile = 0; tile < tiles; tile++)
      for (int64_t i = first; i < last; i++) copy(tile, i);
  }
}

// sums (16 x 48) = or += a b, of `deep` tiles of a panel each. With five of the eight tiles: see tiles.h.
INLINE void multiply_panels(float* sums, const Pair* a, const Pair* b, int64_t deep, bool add) {
  constexpr int bytes = sizeof(float) * COLUMNS;
  std::atomic_signal_fence(std::memory_order_seq_cst);  // a compiler need not know that tiles are loaded from memory
  if (add) {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, sums + SIDE, bytes);
    _tile_loadd(2, sums + 2 * SIDE, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
  }
  for (int64_t k = 0; k < deep; k++, a += TILE, b += WIDE * TILE) {
    _tile_loadd(3, a, 64);
    _tile_loadd(4, b, 64);
    _tile_dpbf16ps(0, 3, 4);
    _tile_loadd(4, b + TILE, 64);
    _tile_dpbf16ps(1, 3, 4);
    _tile_loadd(4, b + 2 * TILE, 64);
    _tile_dpbf16ps(2, 3, 4);
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + SIDE, bytes);
  _tile_stored(2, sums + 2 * SIDE, bytes);
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

// What a product has beside it: out = alpha a b + bias + beta addend, the last two if they are there. What is exact has
// no addend and an alpha of 1.
struct Beside {
  const float* bias;
  const BFloat16* addend;
  int64_t stride;
  float alpha, beta;

  Beside from(int64_t row, int64_t column) const {
    return {bias ? bias + column : nullptr, addend ? addend + row * stride + column : nullptr, stride, alpha, beta};
  }
};

// to (rows x columns, at most 16 x 48) = or += the sums, and what is beside them; `more` than a bias costs time.
template <bool more>
INLINE void write_rows(BFloat16* to, int64_t stride, const float* sums, const Beside& with, int rows, int columns) {
  float padded[COLUMNS] = {};
  if (with.bias) std::memcpy(padded, with.bias, sizeof(float) * columns);
  const Vec<float> bias[WIDE] = {load(padded), load(padded + SIDE), load(padded + 2 * SIDE)};
  for (int i = 0; i < rows; i++, to += stride, sums += COLUMNS) {
    BFloat16 row[COLUMNS];
    Vec<float> sum[WIDE];
    UNROLL for (int j = 0; j < WIDE; j++)
      sum[j] = (more ? load(sums + j * SIDE) * with.alpha : load(sums + j * SIDE)) + bias[j];
    if (more && with.addend) {
      BFloat16 addend[COLUMNS] = {};
      std::memcpy(addend, with.addend + i * with.stride, sizeof(BFloat16) * columns);
      UNROLL for (int j = 0; j < WIDE; j++) sum[j] += load_as<float>(addend + j * SIDE) * with.beta;
    }
    const auto left = _mm512_cvtne2ps_pbh((__m512)sum[1], (__m512)sum[0]);
    const auto right = _mm512_cvtneps_pbh((__m512)sum[2]);
    std::memcpy(columns == COLUMNS ? to : row, &left, sizeof left);
    std::memcpy((columns == COLUMNS ? to : row) + 2 * SIDE, &right, sizeof right);
    if (columns != COLUMNS) std::memcpy(to, row, sizeof(BFloat16) * columns);
  }
}
INLINE void write(BFloat16* to, int64_t stride, const float* sums, const Beside& with, int rows, int columns, bool) {
  if (with.addend || with.alpha != 1) write_rows<true>(to, stride, sums, with, rows, columns);
  else write_rows<false>(to, stride, sums, with, rows, columns);
}
INLINE void write(float* to, int64_t stride, const float* sums, const Beside& with, int rows, int columns, bool add) {
  for (int i = 0; i < rows; i++, to += stride, sums += COLUMNS)
    for (int j = 0; j < columns; j++) to[j] = (add ? to[j] : 0) + (with.bias ? with.bias[j] : 0) + sums[j];
}

template <bool of_b, bool turned, class S> Factor factor(const void* at, int64_t stride, int64_t lines, int64_t K) {
  constexpr bool by_depth = of_b != turned;
  constexpr int unit = of_b ? COLUMNS : SIDE;
  return {at, stride, by_depth ? K : lines, by_depth ? lines : K, by_depth, up(lines, unit), unit,
          copy_panels<of_b, turned, S>};
}

template <class Out>
void matmul(int64_t M, int64_t N, int64_t K, const Factor& a, const Factor& b, const Beside& beside, Out* out,
            int64_t stride, bool add) {
  constexpr bool exact = std::is_same_v<Out, float>;  // what is not would round the sum of each piece
  const int64_t pieces = exact ? (K + DEEPEST - 1) / DEEPEST : 1, depth = up((K + pieces - 1) / pieces, DEPTH_OF_TILE);
  const bool swapped = M < N / 4;
  const Factor &x = swapped ? b : a, &y = swapped ? a : b;  // of which there are strips, and pieces
  const int64_t width = std::min(y.lines, std::max<int64_t>(PIECE / depth / y.unit, 1) * y.unit);
  const int64_t shortest = up(SHORTEST, x.unit), highest = std::max(shortest, STRIP / depth / x.unit * x.unit);
  const int64_t height = std::clamp(up(x.lines / (4 * thread_count()), x.unit), shortest, highest);
  const int64_t strips = (x.lines + height - 1) / height;
  static thread_local Scratch memory;  // not `scratch`, in which this thread's tasks work
  memory.reserve(sizeof(BFloat16) * width * depth);
  Pair* const piece = memory.take<Pair>(width * depth / 2);
  for (int64_t k = 0; k < K; k += depth)
    for (int64_t begin = 0; begin < y.lines; begin += width) {
      const int64_t end = std::min(begin + width, y.lines), panels = (end - begin) / y.unit;
      const Beside with{k ? nullptr : beside.bias, beside.addend, beside.stride, beside.alpha, beside.beta};
      const int64_t deep = (std::min(depth, K - k) + DEPTH_OF_TILE - 1) / DEPTH_OF_TILE;
      for_each_task(y.by_depth ? deep : panels, [&](int64_t task) {
        if (y.by_depth) return y.copy(y, piece, begin, end, k, task, task + 1, deep);
        const int64_t first = begin + task * y.unit;
        y.copy(y, piece + task * y.unit / SIDE * deep * TILE, first, first + y.unit, k, 0, deep, deep);
      });
      // Of few strips each is taken by several threads, with a part of the piece.
      const int64_t groups = std::clamp<int64_t>(2 * thread_count() / strips, 1, panels);
      for_each_task(strips * groups, [&](int64_t task) {
        const int64_t group = task % groups, first_panel = panels * group / groups;
        const int64_t x0 = task / groups * height, x1 = std::min(x0 + height, x.lines);
        const int64_t y0 = begin + first_panel * y.unit, y1 = begin + panels * (group + 1) / groups * y.unit;
        const int64_t row0 = swapped ? y0 : x0, row1 = swapped ? y1 : x1;
        const int64_t column0 = swapped ? x0 : y0, column1 = swapped ? x1 : y1;
        scratch.reserve(sizeof(BFloat16) * height * depth + sizeof(float) * (row1 - row0) * COLUMNS);
        Pair* const strip = scratch.take<Pair>(height * depth / 2);
        float* const sums = scratch.take<float>((row1 - row0) * COLUMNS);
        x.copy(x, strip, x0, x1, k, 0, deep, deep);
        const Pair* const part = piece + first_panel * y.unit / SIDE * deep * TILE;
        const Pair *const left = swapped ? part : strip, *const right = swapped ? strip : part;
        const int64_t nears = (deep + NEAR - 1) / NEAR, near = (deep + nears - 1) / nears;
        const Tiles shaped;
        for (int64_t column = column0; column < column1; column += COLUMNS) {
          const int columns = int(std::min<int64_t>(COLUMNS, N - column));
          Out* const to = out + column;
          const Pair* const panel = right + (column - column0) / SIDE * deep * TILE;
          for (int64_t i = 0; i < deep; i += near)
            for (int64_t row = row0; row < row1; row += SIDE) {
              if (!exact && i + near >= deep)  // what is written soon is asked for: that costs less then
                for (int64_t r = row; r < std::min(row + SIDE, M); r++)
                  for (int j = 0; j < columns; j += 2 * SIDE) __builtin_prefetch(to + r * stride + j, 1, 2);
              multiply_panels(sums + (row - row0) * COLUMNS, left + ((row - row0) / SIDE * deep + i) * TILE,
                              panel + i * WIDE * TILE, std::min(near, deep - i), i);
            }
          for (int64_t row = row0; row < std::min(row1, M); row += SIDE)
            write(to + row * stride, stride, sums + (row - row0) * COLUMNS, with.from(row, column),
                  int(std::min<int64_t>(SIDE, M - row)), columns, add || k);
        }
      });
    }
}

}  // namespace

#endif

// Whether there is the following here.
EXPORT int minigpt2_multiplies_by_tiles() { return TILES && tiles_usable(); }

// out (M x N), float32 or, if not `exact`, bfloat16, = alpha a b, or += it with `add`, which asks for `exact`; and a bias
// (N) and beta times an addend (M x N), if there are any: see Beside. a (M x K), bfloat16, and b (K x N), float32 if
// `wide`, else bfloat16, or what is turned lies as its transpose. None is empty.
EXPORT int minigpt2_matmul(int64_t M, int64_t N, int64_t K, const BFloat16* a, int64_t a_stride, int a_turned,
                           const void* b, int64_t b_stride, int b_turned, int wide, const float* bias,
                           const BFloat16* addend, int64_t addend_stride, double alpha, double beta, void* out,
                           int64_t stride, int exact, int add) {
#ifdef MINIGPT2_TILES
  try {
    const Factor left = (a_turned ? factor<false, true, BFloat16> : factor<false, false, BFloat16>)(a, a_stride, M, K);
    const auto narrow_b = b_turned ? factor<true, true, BFloat16> : factor<true, false, BFloat16>;
    const auto wide_b = b_turned ? factor<true, true, float> : factor<true, false, float>;
    const Factor right = (wide ? wide_b : narrow_b)(b, b_stride, N, K);
    const Beside beside{bias, addend, addend_stride, float(alpha), float(beta)};
    if (exact) matmul(M, N, K, left, right, beside, static_cast<float*>(out), stride, add);
    else matmul(M, N, K, left, right, beside, static_cast<BFloat16*>(out), stride, false);
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
#else
  return NO_SUCH_DTYPE;
#endif
}
