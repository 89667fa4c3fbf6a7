// Causal multi-head attention on the CPU, forward and backward, without ever holding a T x T matrix.
//
// The method is FlashAttention-2 (Dao 2023, arXiv:2307.08691; Dao et al. 2022, arXiv:2205.14135). For one head:
//   forward:   for a band of query rows, for each tile of keys on or below the diagonal:
//                S <- scale Q K^T;  m' <- max(m, rowmax S);  P <- exp(S - m');  factor <- exp(m - m')
//                l <- factor l + rowsum P;  O <- factor O + dropout(P) V;  m <- m'
//              out = O / l, and lse = m + log l is all that the backward pass needs to rebuild P.
//              While a row's maximum is above m by GROWTH at most, m stays, and O and l are spared the factor.
//   backward:  delta <- rowsum(dOut * out)
//              for a band of keys, for each tile of query rows on or below the diagonal:
//                P <- exp(S - lse), S as above;  dP <- dropout(dOut V^T);  dS <- P (dP - delta)
//                dV += dropout(P)^T dOut;  dK += scale dS^T Q;  dQ += scale dS K
// q, k and v are read where the projection left them, in the packed (B, T, 3C) tensor, and copied tile by tile into
// small contiguous buffers in the type that is multiplied. A matrix product is made of one micro-kernel: a strip of
// ROWS x (PANEL vectors) that stays in registers. Tiles lie on one grid and are added in ascending order whatever the
// bands and the threads are, so results do not depend on either, bit for bit.
//
// Sums, the softmax and delta are float32, or float64 for float64. bfloat16 is widened to float32 for the products,
// unless the processor multiplies bfloat16 itself. Then Q, K, V and dOut are multiplied as they are, and P and dS are
// rounded to bfloat16 first, as a plain bfloat16 form rounds them. Such a processor takes numbers in pairs that follow
// each other in the summed dimension, so each operand is copied to lie the way that its product needs (operand.h):
//   Q K^T, dOut V^T    the left one along its rows, the right one, transposed, across them
//   P V, dS K          P and dS along their rows, V and K across them
//   P^T dOut, dS^T Q   both across their rows
// Q, dOut and dS are needed both ways, and kept both ways.
//
// Where a processor has AMX, too, strips are of BLOCK rows and products are made in its registers (tiles.h). It takes
// the left operand along its rows, so the last two products are made transposed: dV^T = dOut^T P, dK^T = Q^T dS.
//
// A product never touches a pair (row, key) above the diagonal, not even to multiply it by zero: a NaN reaches only the
// rows that see it. AMX does multiply by that zero; so where the diagonal cuts a key tile, and what P or dS is to be
// multiplied with is not all finite, the product is made without it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "copies.h"
#include "dropout.h"
#include "interface.h"
#include "microkernel.h"
#include "operand.h"
#include "simd.h"
#include "tasks.h"
#include "tiles.h"

using namespace minigpt2;

namespace {

// Bytes are those of float32 at D = 64. Where bfloat16 is multiplied, which takes half of them, tiles and bands of the
// backward pass are twice as long.
constexpr int GROWTH = 8;           // of a row's maximum over m: P is e^8 at most, and sums of P V bear that
constexpr int QUERY_BAND = 384;     // forward: query rows that share one copy of a key tile; q and O take 192 KB of L2
constexpr int QUERY_TILE = 48;      // backward: P and dS of a tile, 12 KB each, stay in L1 with one more operand
constexpr int KEY_BAND = 384;       // backward: keys between two visits to a query row; 5 buffers of 96 KB in L2
constexpr int MIN_BAND = 192;       // the smallest band backward: a multiple of KEYS, of 2 QUERY_TILE and of ROWS
static_assert(MIN_BAND % BLOCK == 0 && 2 * QUERY_TILE % BLOCK == 0 && 2 * QUERY_BAND % BLOCK == 0);

// Scores without their scale, which K^T takes where it can.
template <class W> INLINE Vec<Sum<W>> scaled(Vec<Sum<W>> scores, Sum<W> scale) {
  return DEPTH<W> == 1 ? scores : scores * scale;
}

struct Shape {
  int64_t B, T, H;
  int D;
  double scale;  // of the scores
};

template <class S> struct Head {  // where one head's rows lie
  S *q, *k, *v;
  int64_t stride;
  Head(S* packed, int64_t batch_stride, int64_t row_stride, const Shape& s, int64_t head)
      : q(packed + head / s.H * batch_stride + head % s.H * s.D), k(q + s.H * s.D), v(k + s.H * s.D),
        stride(row_stride) {}
};

// Forward.

// The softmax of one strip against one tile of keys, from scores s to dropout(P) in p. m and l are what the rows have so
// far: the maxima of s, or up to GROWTH less, and the sums by lane. With `edge`, row i sees columns up to diagonal + i.
// Returns whether an m moved; then the sums so far are to be multiplied by `factor`.
template <class W, int R, bool edge, class A = Sum<W>>
INLINE bool softmax_strip(A* s, W* p, int columns, int diagonal, A scale, A* m, Vec<A>* l, A* factor,
                          const Dropout& dropout, const uint32_t (*keys)[2], int64_t first_column) {
  constexpr int n = LANES<A>;
  constexpr int strip_lanes = (R + n - 1) / n * n;
  alignas(64) A shift[strip_lanes] = {};
  bool moved = false;
  for (int i = 0; i < R; i++) {
    Vec<A> high = splat(m[i]);
    UNROLL for (int j = 0; j < KEYS; j += n) {
      if (edge && j >= columns) break;
      Vec<A> x = load(s + i * KEYS + j);
      if constexpr (edge) {
        x = column_numbers<A>(j) <= diagonal + i ? x : splat(-std::numeric_limits<A>::infinity());
        store(s + i * KEYS + j, x);
      }
      high = larger<A>(x, high);
    }
    const A old = m[i], most = largest_lane<A>(high);
    if (scaled<W>(splat(most - old), scale)[0] > GROWTH) {
      m[i] = most;
      moved = true;
    }
    shift[i] = old - m[i];
  }
  if (moved)
    UNROLL for (int i = 0; i < strip_lanes; i += n) store(factor + i, exp_negative(scaled<W>(load(shift + i), scale)));
  for (int i = 0; i < R; i++) {
    IntVec<A> mask[KEYS / n] = {};
    if (dropout.active) dropout.mask<A>(mask, keys[i], first_column);
    Vec<A> sum = moved ? l[i] * factor[i] : l[i];
    UNROLL for (int j = 0; j < KEYS; j += n) {
      if (edge && j >= columns) break;
      const Vec<A> e = exp_negative(scaled<W>(load(s + i * KEYS + j) - m[i], scale));
      sum += e;
      store_along(p + (i * KEYS + j) / DEPTH<W>, dropout.active ? where<A>(mask[j / n], e) : e);
    }
    l[i] = sum;
  }
  return moved;
}

// Query rows first_row ... first_row + rows of one head.
template <class S, class A, bool tiles>
void forward_band(const Shape& shape, const Head<const S>& in, S* out, A* lse, int64_t head, int64_t first_row,
                  int rows, const Dropout& dropout) {
  using W = Operand<S, A>;
  constexpr int n = LANES<A>, depth = DEPTH<W>, R = tiles ? BLOCK : ROWS;
  const int D = shape.D, padded = round_up(rows, R);
  const A scale = A(shape.scale);
  scratch.reserve(sizeof(A) * (size_t(padded) * (2 * D + n + 3) + 2 * KEYS * D + R * (2 * KEYS + n)) + 16 * 64);
  W* q = scratch.take<W>(size_t(padded) * D / depth);
  A* O = scratch.take<A>(size_t(padded) * D);
  W* k_transposed = scratch.take<W>(KEYS * D / depth);
  W* v = scratch.take<W>(KEYS * D / depth);
  A* s = scratch.take<A>(R * KEYS);
  W* p;
  if constexpr (depth == 1) p = s;
  else p = scratch.take<W>(R * KEYS / depth);
  A* factor = scratch.take<A>(R * n);
  A* m = scratch.take<A>(padded);
  Vec<A>* l = scratch.take<Vec<A>>(padded);
  auto keys = scratch.take<uint32_t[2]>(padded);

  copy_along(q, in.q + first_row * in.stride, in.stride, rows, padded, D);
  std::fill_n(m, padded, std::numeric_limits<A>::lowest());
  std::fill_n(l, padded, Vec<A>{});
  if (dropout.active) dropout.row_keys(keys, uint32_t(head), first_row, padded);

  const int64_t last_row = first_row + rows - 1;
  for (int64_t first_key = 0; first_key <= last_row; first_key += KEYS) {
    const int tile_keys = int(std::min<int64_t>(KEYS, shape.T - first_key));
    copy_transposed(k_transposed, in.k + first_key * in.stride, in.stride, tile_keys, D, scale);
    copy_across(v, in.v + first_key * in.stride, in.stride, tile_keys, KEYS, D);
    const int above = int(std::max<int64_t>(0, first_key - first_row)) / R * R;  // rows that see none of the tile
    const bool exact =  // see seen_product
        tiles && first_key + KEYS > first_row && !finite<A>(in.v + first_key * in.stride, in.stride, tile_keys, D);
    for (int i = above; i < padded; i += R) {
      const int diagonal = int(std::min<int64_t>(first_row + i - first_key, KEYS));
      const bool edge = diagonal < KEYS - 1;
      const int columns = edge ? std::min(KEYS, round_up(diagonal + R, tiles ? BLOCK : n)) : KEYS;
      whole_product<W, R, tiles>(s, KEYS, q + i * D / depth, D / depth, k_transposed, KEYS, columns, D / depth);
      auto softmax = [&](auto at_edge) {
        return softmax_strip<W, R, at_edge()>(s, p, columns, diagonal, scale, m + i, l + i, factor, dropout, keys + i,
                                              first_key);
      };
      const bool moved = edge ? softmax(std::true_type{}) : softmax(std::false_type{});
      const Into into = first_key == 0 ? Into::empty : moved ? Into::rescaled : Into::sum;
      seen_product<W, R, tiles>(O + i * D, D, p, KEYS / depth, v, D, D, columns / depth, diagonal, into, factor,
                                exact && edge);
    }
  }

  for (int i = 0; i < rows; i++) {
    const A total = sum_lanes<A>(l[i]);
    const A normaliser = A(dropout.active ? dropout.keep_scale : 1) / total;
    S* to = out + (first_row + i) * shape.H * D;
    for (int d = 0; d < D; d += n) store_as<A>(to + d, load(O + i * D + d) * normaliser);
    lse[first_row + i] = scaled<W>(splat(m[i]), scale)[0] + std::log(total);
  }
}

template <class S, class A>
void forward(const Shape& shape, const void* qkv, int64_t batch_stride, int64_t row_stride, void* out, void* lse,
             const Dropout& dropout) {
  const int64_t heads = shape.B * shape.H, enough = 2 * thread_count();
  constexpr int depth = DEPTH<Operand<S, A>>;
  int band = QUERY_BAND * depth;
  while (band > QUERY_TILE * depth && heads * ((shape.T + band - 1) / band) < enough) band /= 2;
  const int64_t bands = (shape.T + band - 1) / band;
  for_each_task(heads * bands, [&](int64_t task) {
    const int64_t head = task / bands, first_row = (bands - 1 - task % bands) * band;  // the longest first
    const Head<const S> in(static_cast<const S*>(qkv), batch_stride, row_stride, shape, head);
    S* to = static_cast<S*>(out) + (head / shape.H * shape.T * shape.H + head % shape.H) * shape.D;
    auto run = [&](auto tiles) {
      forward_band<S, A, tiles()>(shape, in, to, static_cast<A*>(lse) + head * shape.T, head, first_row,
                                  int(std::min<int64_t>(band, shape.T - first_row)), dropout);
    };
    with_tiles<Operand<S, A>>(shape.D, run);
  });
}

// Backward.

// The same way back: from scores s and dp = dOut V^T of one strip to dropout(P) and dS. With `edge` they are 0 after
// column diagonal + i of row i, and in what follows the first `rows` rows; without, no product reads what lies there.
template <class W, int R, bool edge, class A = Sum<W>>
INLINE void softmax_backward_strip(const A* s, const A* dp, W* p_across, W* ds, W* ds_across, int rows, int columns,
                                   int diagonal, A scale, const A* lse, A* delta, const Dropout& dropout,
                                   const uint32_t (*keys)[2], int64_t first_column) {
  constexpr int n = LANES<A>, depth = DEPTH<W>;
  using Mask = IntVec<A>[KEYS / n];
  auto probability = [&](int i, int j) {
    const Vec<A> x = scaled<W>(load(s + i * KEYS + j), scale) - lse[i];
    return exp_negative(x > A(0) ? Vec<A>{} : x);  // a huge lse, rounded, must not make P > 1
  };
  auto dp_dropped = [&](int i, int j, const Mask& mask) {
    const Vec<A> x = load(dp + i * KEYS + j);
    return dropout.active ? where<A>(mask[j / n], x) : x;
  };
  // Where a row's keys all lie in this tile, delta can be had as rowsum(P dP) from the rounded P and dP, over rowsum(P),
  // which a large lse leaves not quite 1: dS then sums to 0 as it must, and is exactly 0 for the first row, whose one
  // probability is 1 whatever its score.
  for (int i = 0; first_column == 0 && i < R && diagonal + i < KEYS; i++) {
    Mask mask = {};
    if (dropout.active) dropout.mask<A>(mask, keys[i], first_column);
    Vec<A> sum{}, total{};
    for (int j = 0; j < columns; j += n) {
      const IntVec<A> seen = column_numbers<A>(j) <= diagonal + i;
      sum += where<A>(seen, probability(i, j) * dp_dropped(i, j, mask));
      total += where<A>(seen, probability(i, j));
    }
    const A of_all = sum_lanes<A>(total);
    delta[i] = of_all > A(0) ? sum_lanes<A>(sum) / of_all : sum_lanes<A>(sum);
  }
  for (int first = 0; first < R; first += depth) {
    Mask mask[depth] = {};
    if (dropout.active)
      UNROLL for (int row = 0; row < depth; row++) dropout.mask<A>(mask[row], keys[first + row], first_column);
    UNROLL for (int j = 0; j < KEYS; j += n) {
      if (j >= columns) break;
      Vec<A> dropped_p[depth], row_ds[depth];
      UNROLL for (int row = 0; row < depth; row++) {
        const int i = first + row;
        const Vec<A> P = probability(i, j);
        dropped_p[row] = dropout.active ? where<A>(mask[row][j / n], P) : P;
        row_ds[row] = P * (dp_dropped(i, j, mask[row]) - delta[i]);
        if constexpr (edge) {
          const IntVec<A> seen = column_numbers<A>(j) <= (i < rows ? diagonal + i : -1);
          dropped_p[row] = where<A>(seen, dropped_p[row]);
          row_ds[row] = where<A>(seen, row_ds[row]);
        }
        if constexpr (depth == 2) store_along(ds + (i * KEYS + j) / depth, row_ds[row]);
      }
      store_across(p_across + first * KEYS / depth + j, dropped_p);
      store_across(ds_across + first * KEYS / depth + j, row_ds);
    }
  }
}

// Until a query row has met its last key tile its dQ is a partial sum. The sum is kept, in the type of the arithmetic,
// in the row's own place in the packed gradient: the q part if it is wide enough, and the k part (not yet written) for
// what is left when the storage type is narrower.
template <class S, class A> INLINE A* partial(const Head<S>& grad, int64_t row, int d, int D) {
  const int in_q = D * int(sizeof(S)) / int(sizeof(A));
  S* part = d < in_q ? grad.q : grad.k;
  return reinterpret_cast<A*>(part + row * grad.stride) + d % in_q;
}

struct Part {  // what a pass over one head computes
  bool dq, dkv;
  int64_t first_key, end_key, first_row, end_row;
};

template <class S, class A, bool tiles>
void backward_head(const Shape& shape, const Part& part, const Head<const S>& in, const Head<S>& grad,
                   const S* grad_out, int64_t grad_out_stride, const S* out, const A* lse_of_row, int64_t head,
                   int band, const Dropout& dropout) {
  using W = Operand<S, A>;
  constexpr int n = LANES<A>, depth = DEPTH<W>, R = tiles ? BLOCK : ROWS;
  constexpr int query_tile = QUERY_TILE * depth;
  constexpr bool one_layout = depth == 1;  // along and across are the same
  const int D = shape.D;
  const int64_t T = shape.T, out_stride = shape.H * D;
  const A scale = A(shape.scale), keep = A(dropout.active ? 1 - dropout.p : 1);
  // dP and delta are kept (1 - p) times too small, and P without its 1 / (1 - p): the factor comes in when sums are
  // written.
  const A keep_scale = A(dropout.active ? dropout.keep_scale : 1), ds_scale = scale * keep_scale;
  band = std::min(band, round_up(T, KEYS));
  scratch.reserve(sizeof(A) * (size_t(band) * D * 5 + query_tile * (5 * D + 3 * KEYS + 4) + 2 * R * KEYS) +
                  24 * 64);
  W* k_transposed = scratch.take<W>(size_t(band) * D / depth);  // tile after tile, D x KEYS each
  W* v_transposed = scratch.take<W>(size_t(band) * D / depth);
  W* k = scratch.take<W>(size_t(band) * D / depth);
  A* dk = scratch.take<A>(size_t(band) * D);  // with tiles both are transposed, tile after tile, D x KEYS each
  A* dv = scratch.take<A>(size_t(band) * D);
  W* q = scratch.take<W>(query_tile * D / depth);
  W* q_across = one_layout ? q : scratch.take<W>(query_tile * D / depth);
  W* dout = scratch.take<W>(query_tile * D / depth);
  W* dout_across = one_layout ? dout : scratch.take<W>(query_tile * D / depth);
  A* dq = scratch.take<A>(query_tile * D);
  A* s = scratch.take<A>(R * KEYS);
  A* dp = scratch.take<A>(R * KEYS);
  W* p_across = scratch.take<W>(query_tile * KEYS / depth);
  W* ds = scratch.take<W>(query_tile * KEYS / depth);
  W* ds_across = one_layout ? ds : scratch.take<W>(query_tile * KEYS / depth);
  A* lse = scratch.take<A>(query_tile);
  A* delta = scratch.take<A>(query_tile);
  auto keys = scratch.take<uint32_t[2]>(query_tile);

  for (int64_t band_key = part.first_key; band_key < part.end_key; band_key += band) {
    const int band_keys = int(std::min<int64_t>(band, T - band_key)), padded = round_up(band_keys, KEYS);
    for (int t = 0; t < padded; t += KEYS) {
      const int count = std::min(KEYS, band_keys - t);
      const int64_t at = (band_key + t) * in.stride;
      copy_transposed(k_transposed + t * D / depth, in.k + at, in.stride, count, D, scale);
      copy_transposed(v_transposed + t * D / depth, in.v + at, in.stride, count, D, A(1));
    }
    if (part.dq) copy_across(k, in.k + band_key * in.stride, in.stride, band_keys, padded, D);

    if (part.dkv) {
      std::memset(dk, 0, sizeof(A) * padded * D);
      std::memset(dv, 0, sizeof(A) * padded * D);
    }
    for (int64_t first_row = std::max(band_key, part.first_row); first_row < part.end_row; first_row += query_tile) {
      const int rows = int(std::min<int64_t>(query_tile, T - first_row)), strips = round_up(rows, R);
      const S *from_q = in.q + first_row * in.stride, *from_dout = grad_out + first_row * grad_out_stride;
      copy_along(q, from_q, in.stride, rows, strips, D);
      copy_along(dout, from_dout, grad_out_stride, rows, strips, D);
      auto copy_other_way = [&](W* to, const S* from, int64_t stride) {
        if constexpr (tiles) copy_turned(to, query_tile / depth, from, stride, rows, strips, D);
        else copy_across(to, from, stride, rows, strips, D);
      };
      if (!one_layout && part.dkv) {
        copy_other_way(q_across, from_q, in.stride);
        copy_other_way(dout_across, from_dout, grad_out_stride);
      }
      for (int i = 0; i < strips; i++) {
        Vec<A> sum{};
        if (i < rows)
          for (int d = 0; d < D; d += n)
            sum += load_as<A>(from_dout + i * grad_out_stride + d) * load_as<A>(out + (first_row + i) * out_stride + d);
        delta[i] = sum_lanes<A>(sum) * keep;
        lse[i] = i < rows ? lse_of_row[first_row + i] : A(0);
      }
      if (dropout.active) dropout.row_keys(keys, uint32_t(head), first_row, strips);
      const bool rows_finite = !tiles || !part.dkv || first_row >= band_key + band ||
                               (finite<A>(from_q, in.stride, rows, D) &&
                                finite<A>(from_dout, grad_out_stride, rows, D));
      if (part.dq) {
        if (band_key == 0)
          std::memset(dq, 0, sizeof(A) * strips * D);
        else
          for (int i = 0; i < rows; i++)
            for (int d = 0; d < D; d += 8)
              std::memcpy(dq + i * D + d, partial<S, A>(grad, first_row + i, d, D), 8 * sizeof(A));
      }

      for (int t = 0; t < padded && band_key + t < first_row + rows; t += KEYS) {
        const int64_t first_key = band_key + t;
        const int from_diagonal = int(std::min<int64_t>(first_row - first_key, BELOW));  // how far the tile is below it
        const int above = std::max(0, -from_diagonal) / R * R;  // rows that see none of the tile
        const bool cut = from_diagonal < KEYS - 1;
        // Which products are to leave out what is not finite (see seen_product).
        const bool exact_dkv = cut && !rows_finite;
        const bool exact_dq =
            tiles && part.dq && cut &&
            !finite<A>(in.k + first_key * in.stride, in.stride, int(std::min<int64_t>(KEYS, T - first_key)), D);
        for (int i = above; i < strips; i += R) {
          const int diagonal = from_diagonal + i;
          const int columns = tiles ? KEYS : std::min(KEYS, round_up(diagonal + R, n));
          whole_product<W, R, tiles>(s, KEYS, q + i * D / depth, D / depth, k_transposed + t * D / depth, KEYS, columns,
                                     D / depth);
          whole_product<W, R, tiles>(dp, KEYS, dout + i * D / depth, D / depth, v_transposed + t * D / depth, KEYS,
                                     columns, D / depth);
          const int at = i * KEYS / depth;
          auto softmax = [&](auto at_edge) {
            softmax_backward_strip<W, R, at_edge()>(s, dp, p_across + at, ds + at, ds_across + at, rows - i, columns,
                                                    diagonal, scale, lse + i, delta + i, dropout, keys + i, first_key);
          };
          (tiles && cut) || i + R > rows ? softmax(std::true_type{}) : softmax(std::false_type{});
        }
        if (part.dkv) {
          A *to_dv = dv + t * D, *to_dk = dk + t * D;
          if constexpr (tiles) {
            auto add = [&](A* to, const W* turned, const W* across) {
              turned_product(to, turned + above / depth, query_tile / depth, across + above / depth * KEYS, D, KEYS,
                             strips - above, from_diagonal + above, exact_dkv);
            };
            add(to_dv, dout_across, p_across);
            add(to_dk, q_across, ds_across);
          } else {
            auto add = [&](auto height, int key) {
              constexpr int rows = height();
              strip_product<W, rows, Walk::keys>(to_dv + key * D, D, p_across + key, KEYS, dout_across, D, D,
                                                 strips / depth, key - from_diagonal, Into::sum);
              strip_product<W, rows, Walk::keys>(to_dk + key * D, D, ds_across + key, KEYS, q_across, D, D,
                                                 strips / depth, key - from_diagonal, Into::sum);
            };
            for (int key = 0; key + ROWS <= KEYS; key += ROWS) add(std::integral_constant<int, ROWS>{}, key);
            add(std::integral_constant<int, KEYS % ROWS>{}, KEYS / ROWS * ROWS);
          }
        }
        if (part.dq)
          for (int i = above; i < strips; i += R)
            seen_product<W, R, tiles>(dq + i * D, D, ds + i * KEYS / depth, KEYS / depth, k + t * D / depth, D, D,
                                      KEYS / depth, from_diagonal + i, Into::sum, nullptr, exact_dq);
      }

      if (part.dq) {
        const bool complete = first_row < band_key + band;
        for (int i = 0; i < rows; i++) {
          if (complete)
            for (int d = 0; d < D; d += n)
              store_as<A>(grad.q + (first_row + i) * grad.stride + d, load(dq + i * D + d) * ds_scale);
          else
            for (int d = 0; d < D; d += 8)
              std::memcpy(partial<S, A>(grad, first_row + i, d, D), dq + i * D + d, 8 * sizeof(A));
        }
      }
    }
    if constexpr (tiles) {
      for (int t = 0; part.dkv && t < band_keys; t += KEYS) {
        const int64_t at = (band_key + t) * grad.stride;
        const int count = std::min(KEYS, band_keys - t);
        write_turned(grad.k + at, grad.stride, dk + t * D, count, D, ds_scale);
        write_turned(grad.v + at, grad.stride, dv + t * D, count, D, keep_scale);
      }
    } else if (part.dkv) {
      for (int i = 0; i < band_keys; i++) {
        const int64_t at = (band_key + i) * grad.stride;
        for (int d = 0; d < D; d += n) {
          store_as<A>(grad.k + at + d, load(dk + i * D + d) * ds_scale);
          store_as<A>(grad.v + at + d, load(dv + i * D + d) * keep_scale);
        }
      }
    }
  }
}

template <class S, class A>
void backward(const Shape& shape, const void* qkv, int64_t batch_stride, int64_t row_stride, const void* grad_out,
              int64_t grad_out_batch_stride, int64_t grad_out_row_stride, const void* out, const void* lse,
              void* grad_qkv, const Dropout& dropout) {
  const int64_t T = shape.T, threads = thread_count(), width = shape.H * shape.D;
  const int64_t heads = T ? shape.B * shape.H : 0;  // a tensor without elements has no address to count from
  auto run = [&](int64_t head, int band, const Part& part) {
    const Head<const S> in(static_cast<const S*>(qkv), batch_stride, row_stride, shape, head);
    const Head<S> grad(static_cast<S*>(grad_qkv), T * 3 * width, 3 * width, shape, head);
    const int64_t b = head / shape.H, column = head % shape.H * shape.D;
    with_tiles<Operand<S, A>>(shape.D, [&](auto tiles) {
      backward_head<S, A, tiles()>(
          shape, part, in, grad, static_cast<const S*>(grad_out) + b * grad_out_batch_stride + column,
          grad_out_row_stride, static_cast<const S*>(out) + b * T * width + column,
          static_cast<const A*>(lse) + head * T, head, band, dropout);
    });
  };
  // One task a head does the 5 products once. Two passes, first dQ by bands of rows and then dK and dV by bands of
  // keys, do 7 but make more tasks: worth it only where heads alone would leave threads idle. The sums are the same, in
  // the same order.
  const double one_pass = 5.0 * double((heads + threads - 1) / threads), two_passes = 7.0 * heads / threads;
  if (one_pass <= two_passes || T <= MIN_BAND) {
    const int most = KEY_BAND * DEPTH<Operand<S, A>>;
    const int band = std::clamp(most * 64 / shape.D / MIN_BAND * MIN_BAND, MIN_BAND, most);
    for_each_task(heads, [&](int64_t head) { run(head, band, {true, true, 0, T, 0, T}); });
    return;
  }
  const int64_t bands = (T + MIN_BAND - 1) / MIN_BAND;
  for_each_task(heads * bands, [&](int64_t task) {
    const int64_t first = (bands - 1 - task % bands) * MIN_BAND, end = std::min(first + MIN_BAND, T);
    run(task / bands, MIN_BAND, {true, false, 0, end, first, end});
  });
  for_each_task(heads * bands, [&](int64_t task) {
    const int64_t first = task % bands * MIN_BAND;
    run(task / bands, MIN_BAND, {false, true, first, first + 1, 0, T});
  });
}

}  // namespace

// What bfloat16 is multiplied with, where heads are of a multiple of BLOCK numbers: 0 float32, 1 pairs, 2 tiles.
EXPORT int minigpt2_bfloat16_products() { return !MULTIPLIES_BFLOAT16 ? 0 : tiles_usable() ? 2 : 1; }

// qkv (B, T, 3 H D); out (B, T, H D) and lse (B, H, T) are contiguous. D is a multiple of 16, up to 256. scale > 0. seed
// is null without dropout.
EXPORT int minigpt2_attention(int dtype, int64_t B, int64_t T, int64_t H, int64_t D, const void* qkv,
                              int64_t batch_stride, int64_t row_stride, double scale, void* out, void* lse,
                              double p, const int64_t* seed) {
  return dispatch(dtype, [&]<class S, class A>() {
    forward<S, A>({B, T, H, int(D), scale}, qkv, batch_stride, row_stride, out, lse, Dropout(p, seed));
  });
}

// grad_qkv is contiguous.
EXPORT int minigpt2_attention_backward(int dtype, int64_t B, int64_t T, int64_t H, int64_t D, const void* qkv,
                                       int64_t batch_stride, int64_t row_stride, double scale, const void* grad_out,
                                       int64_t grad_out_batch_stride, int64_t grad_out_row_stride, const void* out,
                                       const void* lse, void* grad_qkv, double p, const int64_t* seed) {
  return dispatch(dtype, [&]<class S, class A>() {
    backward<S, A>({B, T, H, int(D), scale}, qkv, batch_stride, row_stride, grad_out, grad_out_batch_stride,
                   grad_out_row_stride, out, lse, grad_qkv, Dropout(p, seed));
  });
}
