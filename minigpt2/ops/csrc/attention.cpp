// Causal multi-head attention on the CPU, forward and backward, without ever holding a T x T matrix.
//
// The method is FlashAttention (Dao et al. 2022, arXiv:2205.14135). For one head, with S = scale * Q K^T:
//   forward:   for a block of query rows, for each tile of keys on or below the diagonal:
//                S <- Q K^T;  m' <- max(m, rowmax S);  P <- exp(S - m');  c <- exp(m - m')
//                l <- c l + rowsum P;  O <- c O + dropout(P) V;  m <- m'
//              out = O / l, and lse = m + log l is all that the backward pass needs to rebuild P.
//   backward:  delta <- rowsum(dOut * out)
//              for a block of keys, for each tile of query rows on or below the diagonal:
//                P <- exp(Q K^T - lse);  dP <- dropout(dOut V^T);  dS <- P (dP - delta)
//                dV += dropout(P)^T dOut;  dK += scale dS^T Q;  dQ += scale dS K
// q, k and v are read where the projection left them, in the packed (B, T, 3C) tensor, and copied tile by tile into
// small contiguous buffers in the type that the arithmetic uses. Every matrix product is one micro-kernel: a strip of
// ROWS x (PANEL vectors) that stays in registers. Tiles lie on one grid and are added in ascending order whatever the
// blocks and the threads are, so results do not depend on either, bit for bit.
//
// A product never touches a pair (row, key) above the diagonal, not even to multiply it by zero: a NaN reaches only the
// rows that see it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "dropout.h"
#include "interface.h"
#include "microkernel.h"
#include "simd.h"
#include "tasks.h"

using namespace minigpt2;

namespace {

// Bytes are those of float32 at D = 64.
constexpr int KEYS = MASK_COLUMNS;  // of a tile: a strip of scores is 1.5 KB, K^T and V of a tile 16 KB each
constexpr int QUERY_BLOCK = 384;    // forward: query rows that share one copy of a key tile; q and O take 192 KB of L2
constexpr int QUERY_TILE = 48;      // backward: P and dS of a tile, 12 KB each, stay in L1 with one more operand
constexpr int KEY_BLOCK = 384;      // backward: keys between two visits to a query row; 5 buffers of 96 KB in L2
constexpr int MIN_BLOCK = 192;      // the smallest block: a multiple of KEYS, of QUERY_TILE and of ROWS

// Copying tiles.

// to (padded x D, contiguous) = rows of from, then zeros.
template <class A, class S> void copy_rows(A* to, const S* from, int64_t stride, int rows, int padded, int D) {
  for (int i = 0; i < rows; i++, to += D, from += stride)
    for (int d = 0; d < D; d += LANES<A>) store(to + d, load_as<A>(from + d));
  std::memset(to, 0, sizeof(A) * size_t(padded - rows) * D);
}

// to (D x KEYS, contiguous) = factor * the transpose of up to KEYS rows of from, then zeros.
template <class A, class S> void copy_transposed(A* to, const S* from, int64_t stride, int rows, int D, A factor) {
  constexpr int n = LANES<A>;
  for (int key = 0; key < KEYS; key += n)
    for (int d = 0; d < D; d += n) {
      Vec<A> block[n];
      UNROLL for (int i = 0; i < n; i++)
        block[i] = key + i < rows ? factor * load_as<A>(from + (key + i) * stride + d) : Vec<A>{};
      transpose<A>(block);
      UNROLL for (int i = 0; i < n; i++) store(to + (d + i) * KEYS + key, block[i]);
    }
}

struct Shape {
  int64_t B, T, H;
  int D;
  double factor;
  double scale() const { return factor; }  // of the scores
};

template <class S> struct Head {  // where one head's rows lie
  S *q, *k, *v;
  int64_t stride;
  Head(S* packed, int64_t batch_stride, int64_t row_stride, const Shape& s, int64_t head)
      : q(packed + head / s.H * batch_stride + head % s.H * s.D), k(q + s.H * s.D), v(k + s.H * s.D),
        stride(row_stride) {}
};

// Forward.

// The softmax of one strip against one tile of keys. s holds scores on entry and dropout(P) on exit; m, l and factor
// are the strip's running maxima, sums (by lane) and factors of rescaling. With `edge`, row i sees columns up to
// diagonal + i. Returns whether a maximum grew.
template <class A, bool edge>
INLINE bool softmax_strip(A* s, int columns, int diagonal, A* m, Vec<A>* l, A* factor, const Dropout& dropout,
                          const uint32_t (*keys)[2], int64_t first_column) {
  constexpr int n = LANES<A>;
  constexpr int strip_lanes = (ROWS + n - 1) / n * n;
  alignas(64) A shift[strip_lanes] = {};
  bool grew = false;
  for (int i = 0; i < ROWS; i++) {
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
    const A old = m[i];
    m[i] = largest_lane<A>(high);
    shift[i] = old - m[i];
    grew |= old != m[i];
  }
  if (grew)
    UNROLL for (int i = 0; i < strip_lanes; i += n) store(factor + i, exp_negative(load(shift + i)));
  for (int i = 0; i < ROWS; i++) {
    IntVec<A> keep[KEYS / n] = {};
    if (dropout.active) dropout.mask<A>(keep, keys[i], first_column);
    Vec<A> sum = grew ? l[i] * factor[i] : l[i];
    UNROLL for (int j = 0; j < KEYS; j += n) {
      if (edge && j >= columns) break;
      Vec<A> p = exp_negative(load(s + i * KEYS + j) - m[i]);
      sum += p;
      store(s + i * KEYS + j, dropout.active ? where<A>(keep[j / n], p) : p);
    }
    l[i] = sum;
  }
  return grew;
}

// Query rows first_row ... first_row + rows of one head.
template <class S, class A>
void forward_block(const Shape& shape, const Head<const S>& in, S* out, A* lse, int64_t head, int64_t first_row,
                   int rows, const Dropout& dropout) {
  constexpr int n = LANES<A>;
  const int D = shape.D, padded = round_up(rows, ROWS);
  scratch.reserve(sizeof(A) * (size_t(padded) * (2 * D + n + 3) + 2 * KEYS * D + ROWS * (KEYS + n)) + 16 * 64);
  A* q = scratch.take<A>(size_t(padded) * D);
  A* O = scratch.take<A>(size_t(padded) * D);
  A* k_transposed = scratch.take<A>(KEYS * D);
  A* v = scratch.take<A>(KEYS * D);
  A* s = scratch.take<A>(ROWS * KEYS);
  A* factor = scratch.take<A>(ROWS * n);
  A* m = scratch.take<A>(padded);
  Vec<A>* l = scratch.take<Vec<A>>(padded);
  auto keys = scratch.take<uint32_t[2]>(padded);

  copy_rows(q, in.q + first_row * in.stride, in.stride, rows, padded, D);
  std::fill_n(m, padded, std::numeric_limits<A>::lowest());
  std::fill_n(l, padded, Vec<A>{});
  if (dropout.active) dropout.row_keys(keys, uint32_t(head), first_row, padded);

  const int64_t last_row = first_row + rows - 1;
  for (int64_t first_key = 0; first_key <= last_row; first_key += KEYS) {
    const int tile_keys = int(std::min<int64_t>(KEYS, shape.T - first_key));
    copy_transposed(k_transposed, in.k + first_key * in.stride, in.stride, tile_keys, D, A(shape.scale()));
    copy_rows(v, in.v + first_key * in.stride, in.stride, tile_keys, KEYS, D);
    const int above = int(std::max<int64_t>(0, first_key - first_row)) / ROWS * ROWS;  // rows that see none of the tile
    for (int i = above; i < padded; i += ROWS) {
      const int diagonal = int(std::min<int64_t>(first_row + i - first_key, KEYS));
      Into into = first_key == 0 ? Into::empty : Into::sum;
      bool grew;
      if (diagonal >= KEYS - 1) {
        strip_product<A, ROWS, Walk::rows>(s, KEYS, q + i * D, D, k_transposed, KEYS, KEYS, D, BELOW, Into::empty);
        grew = softmax_strip<A, false>(s, KEYS, diagonal, m + i, l + i, factor, dropout, keys + i, first_key);
      } else {
        const int columns = std::min(KEYS, round_up(diagonal + ROWS, n));
        strip_product<A, ROWS, Walk::rows>(s, KEYS, q + i * D, D, k_transposed, KEYS, columns, D, BELOW, Into::empty);
        grew = softmax_strip<A, true>(s, columns, diagonal, m + i, l + i, factor, dropout, keys + i, first_key);
      }
      if (grew && into == Into::sum) into = Into::rescaled;
      strip_product<A, ROWS, Walk::rows>(O + i * D, D, s, KEYS, v, D, D, KEYS, diagonal, into, factor);
    }
  }

  for (int i = 0; i < rows; i++) {
    const A total = sum_lanes<A>(l[i]);
    const A factor = A(dropout.active ? dropout.keep_scale : 1) / total;
    S* to = out + (first_row + i) * shape.H * D;
    for (int d = 0; d < D; d += n) store_as<A>(to + d, load(O + i * D + d) * factor);
    lse[first_row + i] = m[i] + std::log(total);
  }
}

template <class S, class A>
void forward(const Shape& shape, const void* qkv, int64_t batch_stride, int64_t row_stride, void* out, void* lse,
             const Dropout& dropout) {
  const int64_t heads = shape.B * shape.H, enough = 2 * thread_count();
  int block = QUERY_BLOCK;
  while (block > ROWS * 8 && heads * ((shape.T + block - 1) / block) < enough) block /= 2;
  const int64_t blocks = (shape.T + block - 1) / block;
  for_each_task(heads * blocks, [&](int64_t task) {
    const int64_t head = task / blocks, first_row = (blocks - 1 - task % blocks) * block;  // the longest first
    const Head<const S> in(static_cast<const S*>(qkv), batch_stride, row_stride, shape, head);
    S* to = static_cast<S*>(out) + (head / shape.H * shape.T * shape.H + head % shape.H) * shape.D;
    forward_block<S, A>(shape, in, to, static_cast<A*>(lse) + head * shape.T, head, first_row,
                        int(std::min<int64_t>(block, shape.T - first_row)), dropout);
  });
}

// Backward.

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

template <class S, class A>
void backward_head(const Shape& shape, const Part& part, const Head<const S>& in, const Head<S>& grad,
                   const S* grad_out, int64_t grad_out_stride, const S* out, const A* lse_of_row, int64_t head,
                   int block, const Dropout& dropout) {
  constexpr int n = LANES<A>;
  const int D = shape.D;
  const int64_t T = shape.T, out_stride = shape.H * D;
  const A scale = A(shape.scale()), keep = A(dropout.active ? 1 - dropout.p : 1);
  // dP and delta are kept (1 - p) times too small, and P without its 1 / (1 - p): the factor comes in when sums are
  // written.
  const A keep_scale = A(dropout.active ? dropout.keep_scale : 1), ds_scale = scale * keep_scale;
  block = std::min(block, round_up(T, KEYS));
  scratch.reserve(sizeof(A) * (size_t(block) * D * 5 + QUERY_TILE * (3 * D + 2 * KEYS + 4)) + 16 * 64);
  A* k_transposed = scratch.take<A>(size_t(block) * D);  // tile after tile, D x KEYS each
  A* v_transposed = scratch.take<A>(size_t(block) * D);
  A* k = scratch.take<A>(size_t(block) * D);
  A* dk = scratch.take<A>(size_t(block) * D);
  A* dv = scratch.take<A>(size_t(block) * D);
  A* q = scratch.take<A>(QUERY_TILE * D);
  A* dout = scratch.take<A>(QUERY_TILE * D);
  A* dq = scratch.take<A>(QUERY_TILE * D);
  A* p = scratch.take<A>(QUERY_TILE * KEYS);
  A* ds = scratch.take<A>(QUERY_TILE * KEYS);
  A* lse = scratch.take<A>(QUERY_TILE);
  A* delta = scratch.take<A>(QUERY_TILE);
  auto keys = scratch.take<uint32_t[2]>(QUERY_TILE);

  for (int64_t block_key = part.first_key; block_key < part.end_key; block_key += block) {
    const int block_keys = int(std::min<int64_t>(block, T - block_key)), padded = round_up(block_keys, KEYS);
    for (int t = 0; t < padded; t += KEYS) {
      const int count = std::min(KEYS, block_keys - t);
      const int64_t at = (block_key + t) * in.stride;
      copy_transposed(k_transposed + t * D, in.k + at, in.stride, count, D, scale);
      copy_transposed(v_transposed + t * D, in.v + at, in.stride, count, D, A(1));
    }
    if (part.dq) copy_rows(k, in.k + block_key * in.stride, in.stride, block_keys, padded, D);

    if (part.dkv) {
      std::memset(dk, 0, sizeof(A) * padded * D);
      std::memset(dv, 0, sizeof(A) * padded * D);
    }
    for (int64_t first_row = std::max(block_key, part.first_row); first_row < part.end_row; first_row += QUERY_TILE) {
      const int rows = int(std::min<int64_t>(QUERY_TILE, T - first_row)), strips = round_up(rows, ROWS);
      copy_rows(q, in.q + first_row * in.stride, in.stride, rows, strips, D);
      copy_rows(dout, grad_out + first_row * grad_out_stride, grad_out_stride, rows, strips, D);
      for (int i = 0; i < strips; i++) {
        Vec<A> sum{};
        if (i < rows)
          for (int d = 0; d < D; d += n)
            sum += load(dout + i * D + d) * load_as<A>(out + (first_row + i) * out_stride + d);
        delta[i] = sum_lanes<A>(sum) * keep;
        lse[i] = i < rows ? lse_of_row[first_row + i] : A(0);
      }
      if (dropout.active) dropout.row_keys(keys, uint32_t(head), first_row, strips);
      if (part.dq) {
        if (block_key == 0)
          std::memset(dq, 0, sizeof(A) * strips * D);
        else
          for (int i = 0; i < rows; i++)
            for (int d = 0; d < D; d += 8)
              std::memcpy(dq + i * D + d, partial<S, A>(grad, first_row + i, d, D), 8 * sizeof(A));
      }

      for (int t = 0; t < padded && block_key + t < first_row + rows; t += KEYS) {
        const int64_t first_key = block_key + t;
        const int from_diagonal = int(std::min<int64_t>(first_row - first_key, BELOW));  // how far the tile is below it
        for (int i = 0; i < strips; i += ROWS) {
          const int diagonal = from_diagonal + i, columns = std::min(KEYS, round_up(diagonal + ROWS, n));
          if (columns <= 0) continue;
          A *sp = p + i * KEYS, *sds = ds + i * KEYS;
          strip_product<A, ROWS, Walk::rows>(sp, KEYS, q + i * D, D, k_transposed + t * D, KEYS,
                                             columns, D, BELOW, Into::empty);
          strip_product<A, ROWS, Walk::rows>(sds, KEYS, dout + i * D, D, v_transposed + t * D, KEYS,
                                             columns, D, BELOW, Into::empty);
          for (int r = 0; r < ROWS; r++) {
            IntVec<A> kept[KEYS / n] = {};
            Vec<A> probability[KEYS / n] = {}, dp[KEYS / n] = {};
            if (dropout.active) dropout.mask<A>(kept, keys[i + r], first_key);
            UNROLL for (int j = 0; j < KEYS / n; j++) {
              if (j * n >= columns) break;
              const Vec<A> x = load(sp + r * KEYS + j * n) - lse[i + r];
              probability[j] = exp_negative(x > A(0) ? Vec<A>{} : x);  // the rounding of a huge lse must not make P > 1
              dp[j] = load(sds + r * KEYS + j * n);
              if (dropout.active) dp[j] = where<A>(kept[j], dp[j]);
              store(sp + r * KEYS + j * n, dropout.active ? where<A>(kept[j], probability[j]) : probability[j]);
            }
            // Where a row's keys all lie in this tile, delta can be had as rowsum(P dP) from the rounded P and dP, over
            // rowsum(P), which a large lse leaves not quite 1: dS then sums to 0 as it must, and is exactly 0 for the
            // first row, whose one probability is 1 whatever its score.
            if (first_key == 0 && diagonal + r < KEYS) {
              Vec<A> sum{}, total{};
              UNROLL for (int j = 0; j < KEYS / n; j++) {
                const IntVec<A> seen = column_numbers<A>(j * n) <= diagonal + r;
                sum += where<A>(seen, probability[j] * dp[j]);
                total += where<A>(seen, probability[j]);
              }
              const A of_all = sum_lanes<A>(total);
              delta[i + r] = of_all > A(0) ? sum_lanes<A>(sum) / of_all : sum_lanes<A>(sum);
            }
            UNROLL for (int j = 0; j < KEYS / n; j++) {
              if (j * n >= columns) break;
              store(sds + r * KEYS + j * n, probability[j] * (dp[j] - delta[i + r]));
            }
          }
        }
        if (part.dkv) {
          auto add = [&](auto height, int key) {
            constexpr int R = height();
            A *to_dv = dv + (t + key) * D, *to_dk = dk + (t + key) * D;
            strip_product<A, R, Walk::keys>(to_dv, D, p + key, KEYS, dout, D, D, strips,
                                              key - from_diagonal, Into::sum);
            strip_product<A, R, Walk::keys>(to_dk, D, ds + key, KEYS, q, D, D, strips,
                                              key - from_diagonal, Into::sum);
          };
          for (int key = 0; key + ROWS <= KEYS; key += ROWS) add(std::integral_constant<int, ROWS>{}, key);
          add(std::integral_constant<int, KEYS % ROWS>{}, KEYS / ROWS * ROWS);
        }
        if (part.dq)
          for (int i = 0; i < strips; i += ROWS)
            strip_product<A, ROWS, Walk::rows>(dq + i * D, D, ds + i * KEYS, KEYS, k + t * D, D, D, KEYS,
                                             from_diagonal + i, Into::sum);
      }

      if (part.dq) {
        const bool complete = first_row < block_key + block;
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
    if (part.dkv)
      for (int i = 0; i < block_keys; i++) {
        const int64_t at = (block_key + i) * grad.stride;
        for (int d = 0; d < D; d += n) {
          store_as<A>(grad.k + at + d, load(dk + i * D + d) * ds_scale);
          store_as<A>(grad.v + at + d, load(dv + i * D + d) * keep_scale);
        }
      }
  }
}

template <class S, class A>
void backward(const Shape& shape, const void* qkv, int64_t batch_stride, int64_t row_stride, const void* grad_out,
              int64_t grad_out_batch_stride, int64_t grad_out_row_stride, const void* out, const void* lse,
              void* grad_qkv, const Dropout& dropout) {
  const int64_t heads = shape.B * shape.H, T = shape.T, threads = thread_count(), width = shape.H * shape.D;
  auto run = [&](int64_t head, int block, const Part& part) {
    const Head<const S> in(static_cast<const S*>(qkv), batch_stride, row_stride, shape, head);
    const Head<S> grad(static_cast<S*>(grad_qkv), T * 3 * width, 3 * width, shape, head);
    const int64_t b = head / shape.H, column = head % shape.H * shape.D;
    backward_head<S, A>(shape, part, in, grad,
                        static_cast<const S*>(grad_out) + b * grad_out_batch_stride + column, grad_out_row_stride,
                        static_cast<const S*>(out) + b * T * width + column, static_cast<const A*>(lse) + head * T,
                        head, block, dropout);
  };
  // One task a head does the 5 products once. Two passes, first dQ by blocks of rows and then dK and dV by blocks of
  // keys, do 7 but make more tasks: worth it only where heads alone would leave threads idle. The sums are the same, in
  // the same order.
  const double one_pass = 5.0 * double((heads + threads - 1) / threads), two_passes = 7.0 * heads / threads;
  if (one_pass <= two_passes || T <= MIN_BLOCK) {
    const int block = std::clamp(KEY_BLOCK * 64 / shape.D / MIN_BLOCK * MIN_BLOCK, MIN_BLOCK, KEY_BLOCK);
    for_each_task(heads, [&](int64_t head) { run(head, block, {true, true, 0, T, 0, T}); });
    return;
  }
  const int64_t blocks = (T + MIN_BLOCK - 1) / MIN_BLOCK;
  for_each_task(heads * blocks, [&](int64_t task) {
    const int64_t first = (blocks - 1 - task % blocks) * MIN_BLOCK, end = std::min(first + MIN_BLOCK, T);
    run(task / blocks, MIN_BLOCK, {true, false, 0, end, first, end});
  });
  for_each_task(heads * blocks, [&](int64_t task) {
    const int64_t first = task % blocks * MIN_BLOCK;
    run(task / blocks, MIN_BLOCK, {false, true, first, first + 1, 0, T});
  });
}

}  // namespace

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
