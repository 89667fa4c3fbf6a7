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
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include <torch/csrc/stable/c/shim.h>  // torch_parallel_for: at::parallel_for behind a C interface, 0.1 s to compile

namespace {

// Sizes.

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, PANEL = 4;  // 32 registers: 6 x 4 sums, 4 loads, 1 broadcast
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, PANEL = 2;  // 16 registers: 6 x 2 sums, 2 loads, 1 broadcast
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, PANEL = 4;  // 32 registers
#else
constexpr int VECTOR_BYTES = 16, PANEL = 2;
#endif

constexpr int ROWS = 6;           // rows of a strip
constexpr int KEYS = 64;          // keys of a tile: a strip of scores is 1.5 KB, K^T and V of a tile 16 KB each (D = 64)
constexpr int QUERY_BLOCK = 384;  // forward: query rows that share one copy of a key tile; q and O take 192 KB of L2
constexpr int QUERY_TILE = 48;    // backward: P and dS of a tile, 12 KB each, stay in L1 with one more operand
constexpr int KEY_BLOCK = 384;    // backward: keys between two visits to a query row; 5 buffers of 96 KB in L2 (D = 64)
constexpr int MIN_BLOCK = 192;    // the smallest block: a multiple of KEYS, of QUERY_TILE and of ROWS

#define INLINE [[gnu::always_inline]] inline
#define UNROLL _Pragma("GCC unroll 16")

// Vectors.

template <class A> struct Simd;
template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint32_t Word __attribute__((vector_size(VECTOR_BYTES)));  // as many 32-bit words as V has lanes
};
template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint32_t Word __attribute__((vector_size(VECTOR_BYTES / 2)));
};
template <class A> using Vec = typename Simd<A>::V;
template <class A> using IntVec = typename Simd<A>::I;
template <class A> using WordVec = typename Simd<A>::Word;
template <class A> constexpr int LANES = VECTOR_BYTES / int(sizeof(A));

template <class A> INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A> INLINE void store(A* p, Vec<A> v) { std::memcpy(p, &v, sizeof v); }
template <class A> INLINE Vec<A> splat(A x) { return x - Vec<A>{}; }
template <class A> INLINE Vec<A> larger(Vec<A> a, Vec<A> b) { return a > b ? a : b; }  // b where a is NaN

template <class A> INLINE Vec<A> where(IntVec<A> mask, Vec<A> v) { return mask ? v : Vec<A>{}; }
template <class A> INLINE IntVec<A> column_numbers(int first) {
  IntVec<A> v;
  UNROLL for (int i = 0; i < LANES<A>; i++) v[i] = first + i;
  return v;
}

template <class V, size_t... i> INLINE V interleave(V a, V b, bool high, std::index_sequence<i...>) {
  constexpr int n = sizeof...(i);
  return high ? __builtin_shufflevector(a, b, int(n / 2 + i / 2 + (i % 2) * n)...)
              : __builtin_shufflevector(a, b, int(i / 2 + (i % 2) * n)...);
}

// n rounds of interleaving row i with row i + n/2 transpose an n x n block.
template <class A> INLINE void transpose(Vec<A> (&rows)[LANES<A>]) {
  constexpr int n = LANES<A>;
  using Lanes = std::make_index_sequence<n>;
  UNROLL for (int round = 1; round < n; round *= 2) {
    Vec<A> next[n];
    UNROLL for (int i = 0; i < n / 2; i++) {
      next[2 * i] = interleave(rows[i], rows[i + n / 2], false, Lanes{});
      next[2 * i + 1] = interleave(rows[i], rows[i + n / 2], true, Lanes{});
    }
    UNROLL for (int i = 0; i < n; i++) rows[i] = next[i];
  }
}

template <class V, size_t... i> INLINE V swap_lanes(V v, int distance, std::index_sequence<i...>) {
  switch (distance) {
    case 8: return __builtin_shufflevector(v, v, int((i ^ 8) % sizeof...(i))...);
    case 4: return __builtin_shufflevector(v, v, int((i ^ 4) % sizeof...(i))...);
    case 2: return __builtin_shufflevector(v, v, int((i ^ 2) % sizeof...(i))...);
    default: return __builtin_shufflevector(v, v, int(i ^ 1)...);
  }
}
template <class A> INLINE A largest_lane(Vec<A> v) {
  UNROLL for (int d = LANES<A> / 2; d; d /= 2)
    v = larger<A>(swap_lanes(v, d, std::make_index_sequence<LANES<A>>{}), v);
  return v[0];
}
template <class A> INLINE A sum_lanes(Vec<A> v) {
  UNROLL for (int d = LANES<A> / 2; d; d /= 2) v += swap_lanes(v, d, std::make_index_sequence<LANES<A>>{});
  return v[0];
}

// exp(x) for x <= 0. With n = round(x / ln 2) and r = x - n ln 2 in [-0.35, 0.35], a polynomial of degree 5 gives e^r to
// 1e-7; multiplying by 2^n (not adding n to the exponent's bits) keeps a NaN a NaN. Below -87 the result would be
// subnormal: it is 0. ln 2 in one float is exact enough: it is off by 2e-9, times n <= 126.
INLINE Vec<float> exp_negative(Vec<float> x) {
  const Vec<float> magic = splat(0x1.8p23f + 127);  // adding it rounds to an integer and leaves n + 127 in the low bits
  Vec<float> t = x * 1.44269504f + magic;
  Vec<float> r = x - (t - magic) * 0.693147181f;
  Vec<float> y = r * 8.29013758e-3f + 4.18988865e-2f;
  y = y * r + 1.66676442e-1f;
  y = y * r + 4.99991425e-1f;
  y = y * r + 9.99999704e-1f;
  y = y * r + 1.0f;
  IntVec<float> bits;
  std::memcpy(&bits, &t, sizeof bits);
  bits <<= 23;
  Vec<float> power;
  std::memcpy(&power, &bits, sizeof bits);
  return x < -87.0f ? splat(0.0f) : y * power;
}
INLINE Vec<double> exp_negative(Vec<double> x) {
  UNROLL for (int i = 0; i < LANES<double>; i++) x[i] = std::exp(x[i]);
  return x;
}

// Storage types.

struct BFloat16 { uint16_t bits; };

// S is the type in memory, A the type of the arithmetic.
template <class A> INLINE Vec<A> load_as(const A* p) { return load(p); }
template <class A> INLINE Vec<A> load_as(const BFloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  Half h;
  std::memcpy(&h, p, sizeof h);
  WordVec<float> w = __builtin_convertvector(h, WordVec<float>) << 16;
  Vec<float> v;
  std::memcpy(&v, &w, sizeof v);
  return v;
}
template <class A> INLINE void store_as(A* p, Vec<A> v) { store(p, v); }
template <class A> INLINE void store_as(BFloat16* p, Vec<float> v) {
  typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  WordVec<float> w;
  std::memcpy(&w, &v, sizeof w);
  WordVec<float> rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;  // to nearest, ties to even
  rounded = v == v ? rounded : (w >> 16) | 0x40;                   // NaN stays NaN
  Half h = __builtin_convertvector(rounded, Half);
  std::memcpy(p, &h, sizeof h);
}

// Dropout.
//
// The mask is a pure function of (seed, b * H + h, row, column), in 32-bit unsigned arithmetic that wraps around:
//   mix(x):        x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16
//   key(c):        mix(mix(mix(mix(low word of seed + c) ^ high word of seed) + (b * H + h)) ^ row)
//   key0, key1:    key(0x9e3779b9), key(0x85ebca6b): 64 bits a row, so that rows do not share stretches of mask
//   word(w):       x = w * 0x9e3779b9 + key0; x ^= x >> 16; x *= 0x7feb352d; x += key1;
//                  x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16
//   value(column): 16 bits of word(column / 32 * 16 + column % 16): the low half if column % 32 < 16, else the high half
// and an element is kept where value >= round(p * 65536). So p is honoured to 1 / 131072. What is kept is scaled by
// 1 / (1 - p), as torch does.

INLINE uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

struct Dropout {
  bool active;
  double p;
  uint32_t threshold, seed_low, seed_high;
  double keep_scale;  // 1 / (1 - p)

  Dropout(double p, const int64_t* seed)
      : active(p > 0 && seed), p(p), threshold(uint32_t(std::lround(p * 65536))),
        seed_low(active ? uint32_t(uint64_t(*seed)) : 0), seed_high(active ? uint32_t(uint64_t(*seed) >> 32) : 0),
        keep_scale(p < 1 ? 1 / (1 - p) : 0) {}

  uint32_t key(uint32_t constant, uint32_t head, uint32_t row) const {
    return mix(mix(mix(mix(seed_low + constant) ^ seed_high) + head) ^ row);
  }
  void row_keys(uint32_t (*keys)[2], uint32_t head, int64_t first_row, int rows) const {
    for (int i = 0; i < rows; i++) {
      keys[i][0] = key(0x9e3779b9u, head, uint32_t(first_row + i));
      keys[i][1] = key(0x85ebca6bu, head, uint32_t(first_row + i));
    }
  }

  // keep[j]: all bits set in the lanes of the columns first_column + LANES * j ... that are kept.
  template <class A> INLINE void mask(IntVec<A> (&keep)[KEYS / LANES<A>], const uint32_t (&row_key)[2],
                                      int64_t first_column) const {
    constexpr int n = LANES<A>;
    static_assert(16 % n == 0);
    WordVec<A> lane;
    UNROLL for (int i = 0; i < n; i++) lane[i] = i;
    UNROLL for (int column = 0; column < KEYS; column += 32) {
      UNROLL for (int part = 0; part < 16; part += n) {
        WordVec<A> x = (lane + uint32_t((first_column + column) / 2 + part)) * 0x9e3779b9u + row_key[0];
        x ^= x >> 16;
        x *= 0x7feb352du;
        x += row_key[1];
        x ^= x >> 15;
        x *= 0x846ca68bu;
        x ^= x >> 16;
        keep[(column + part) / n] = __builtin_convertvector((x & 0xffff) >= threshold, IntVec<A>);
        keep[(column + part + 16) / n] = __builtin_convertvector((x >> 16) >= threshold, IntVec<A>);
      }
    }
  }
};

// The micro-kernel.

// One strip of c += a b: R rows, NV vectors of columns, k from 0 to n. Pairs (row i, k) on the wrong side of the diagonal
// are left out:
//   Walk::rows  a is rows of scores (i: query, k: key), element (i, k) at a[i * lda + k]; i sees k <= diagonal + i
//   Walk::keys  a is columns of scores (i: key, k: query), element (i, k) at a[k * lda + i]; i is seen by k >= diagonal + i
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

// A tile's sum starts from zero and is added to c as a whole: the rounding errors of a long chain of additions would grow
// with T.
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

// Tasks and scratch.

int round_up(int64_t n, int step) { return int((n + step - 1) / step * step); }

// A worker's buffers, kept from call to call: the pages of a fresh allocation cost more than a short attention.
struct Scratch {
  char* memory = nullptr;
  size_t capacity = 0, used = 0;
  ~Scratch() { std::free(memory); }
  void reserve(size_t bytes) {
    used = 0;
    if (bytes <= capacity) return;
    std::free(memory);
    capacity = 0;
    memory = static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
    if (!memory) throw std::bad_alloc();
    capacity = bytes;
  }
  template <class X> X* take(size_t count) {
    X* p = reinterpret_cast<X*>(memory + used);
    used += (count * sizeof(X) + 63) / 64 * 64;
    return p;
  }
};
thread_local Scratch scratch;

// Calls body(task) once for every task, on torch's own threads. A thread takes the next task when it is free, because
// tasks under a causal mask differ in length.
template <class F> void for_each_task(int64_t tasks, const F& body) {
  struct Shared { std::atomic<int64_t> next; int64_t tasks; const F& body; } shared{{0}, tasks, body};
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  const int failed = torch_parallel_for(
      0, std::min<int64_t>(threads, tasks), 1,
      [](int64_t, int64_t, void* context) {
        Shared& s = *static_cast<Shared*>(context);
        for (int64_t task; (task = s.next.fetch_add(1)) < s.tasks;) s.body(task);
      },
      &shared);
  if (failed) throw std::bad_alloc();
}

int64_t thread_count() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return threads;
}

struct Shape {
  int64_t B, T, H;
  int D;
  double scale() const { return 1 / std::sqrt(double(D)); }
};

template <class S> struct Head {  // where one head's rows lie
  S *q, *k, *v;
  int64_t stride;
  Head(S* packed, int64_t batch_stride, int64_t row_stride, const Shape& s, int64_t head)
      : q(packed + head / s.H * batch_stride + head % s.H * s.D), k(q + s.H * s.D), v(k + s.H * s.D),
        stride(row_stride) {}
};

// Forward.

// The softmax of one strip against one tile of keys. s holds scores on entry and dropout(P) on exit; top, l and factor
// are the strip's running maxima, sums (by lane) and rescaling factors. With `edge`, row i sees columns <= diagonal + i.
// Returns whether a maximum grew.
template <class A, bool edge>
INLINE bool softmax_strip(A* s, int columns, int diagonal, A* top, Vec<A>* l, A* factor, const Dropout& dropout,
                          const uint32_t (*keys)[2], int64_t first_column) {
  constexpr int n = LANES<A>;
  constexpr int strip_lanes = (ROWS + n - 1) / n * n;
  alignas(64) A shift[strip_lanes] = {};
  bool grew = false;
  for (int i = 0; i < ROWS; i++) {
    Vec<A> high = splat(top[i]);
    UNROLL for (int j = 0; j < KEYS; j += n) {
      if (edge && j >= columns) break;
      Vec<A> x = load(s + i * KEYS + j);
      if constexpr (edge) {
        x = column_numbers<A>(j) <= diagonal + i ? x : splat(-std::numeric_limits<A>::infinity());
        store(s + i * KEYS + j, x);
      }
      high = larger<A>(x, high);
    }
    const A old = top[i];
    top[i] = largest_lane<A>(high);
    shift[i] = old - top[i];
    grew |= old != top[i];
  }
  if (grew)
    UNROLL for (int i = 0; i < strip_lanes; i += n) store(factor + i, exp_negative(load(shift + i)));
  for (int i = 0; i < ROWS; i++) {
    IntVec<A> keep[KEYS / n] = {};
    if (dropout.active) dropout.mask<A>(keep, keys[i], first_column);
    Vec<A> sum = grew ? l[i] * factor[i] : l[i];
    UNROLL for (int j = 0; j < KEYS; j += n) {
      if (edge && j >= columns) break;
      Vec<A> p = exp_negative(load(s + i * KEYS + j) - top[i]);
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
  A* sums = scratch.take<A>(size_t(padded) * D);
  A* k_transposed = scratch.take<A>(KEYS * D);
  A* v = scratch.take<A>(KEYS * D);
  A* s = scratch.take<A>(ROWS * KEYS);
  A* factor = scratch.take<A>(ROWS * n);
  A* top = scratch.take<A>(padded);
  Vec<A>* l = scratch.take<Vec<A>>(padded);
  auto keys = scratch.take<uint32_t[2]>(padded);

  copy_rows(q, in.q + first_row * in.stride, in.stride, rows, padded, D);
  std::fill_n(top, padded, std::numeric_limits<A>::lowest());
  std::fill_n(l, padded, Vec<A>{});
  if (dropout.active) dropout.row_keys(keys, uint32_t(head), first_row, padded);

  const int64_t last_row = first_row + rows - 1;
  for (int64_t first_key = 0; first_key <= last_row; first_key += KEYS) {
    const int tile_keys = int(std::min<int64_t>(KEYS, shape.T - first_key));
    copy_transposed(k_transposed, in.k + first_key * in.stride, in.stride, tile_keys, D, A(shape.scale()));
    copy_rows(v, in.v + first_key * in.stride, in.stride, tile_keys, KEYS, D);
    const int above = int(std::max<int64_t>(0, first_key - first_row)) / ROWS * ROWS;  // strips that see none of the tile
    for (int i = above; i < padded; i += ROWS) {
      const int diagonal = int(std::min<int64_t>(first_row + i - first_key, KEYS));
      Into into = first_key == 0 ? Into::empty : Into::sum;
      bool grew;
      if (diagonal >= KEYS - 1) {
        strip_product<A, ROWS, Walk::rows>(s, KEYS, q + i * D, D, k_transposed, KEYS, KEYS, D, BELOW, Into::empty);
        grew = softmax_strip<A, false>(s, KEYS, diagonal, top + i, l + i, factor, dropout, keys + i, first_key);
      } else {
        const int columns = std::min(KEYS, round_up(diagonal + ROWS, n));
        strip_product<A, ROWS, Walk::rows>(s, KEYS, q + i * D, D, k_transposed, KEYS, columns, D, BELOW, Into::empty);
        grew = softmax_strip<A, true>(s, columns, diagonal, top + i, l + i, factor, dropout, keys + i, first_key);
      }
      if (grew && into == Into::sum) into = Into::rescaled;
      strip_product<A, ROWS, Walk::rows>(sums + i * D, D, s, KEYS, v, D, D, KEYS, diagonal, into, factor);
    }
  }

  for (int i = 0; i < rows; i++) {
    const A total = sum_lanes<A>(l[i]);
    const A factor = A(dropout.active ? dropout.keep_scale : 1) / total;
    S* to = out + (first_row + i) * shape.H * D;
    for (int d = 0; d < D; d += n) store_as<A>(to + d, load(sums + i * D + d) * factor);
    lse[first_row + i] = top[i] + std::log(total);
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
  // dP and delta are kept (1 - p) times too small, P without its 1 / (1 - p): the factor comes in when sums are written.
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
  // One task a head does the 5 products once. Two passes, first dQ by blocks of rows and then dK and dV by blocks of keys,
  // do 7 but make more tasks: worth it only where heads alone would leave threads idle. The sums are the same, in the
  // same order.
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

// One query against a cache.

// The scores of LANES keys at once: partial products by lane, then a transpose turns sums across lanes into sums of vectors.
template <class S, class A> INLINE Vec<A> scores(const A* q, const S* k, int64_t stride, int count, int D) {
  constexpr int n = LANES<A>;
  Vec<A> sum[n];
  UNROLL for (int i = 0; i < n; i++) {
    sum[i] = Vec<A>{};
    const S* row = k + (i < count ? i : 0) * stride;
    for (int d = 0; d < D; d += n) sum[i] += load(q + d) * load_as<A>(row + d);
  }
  transpose<A>(sum);
  UNROLL for (int half = n / 2; half; half /= 2)
    UNROLL for (int i = 0; i < half; i++) sum[i] += sum[i + half];
  return sum[0];
}

template <class S, class A>
void decode_head(const S* q, const S* k, int64_t k_stride, const S* v, int64_t v_stride, S* out, int64_t T, int D) {
  constexpr int n = LANES<A>, MAX_D = 256;
  alignas(64) A query[MAX_D], sums[MAX_D] = {}, p[KEYS];
  const A scale = A(1 / std::sqrt(double(D)));
  for (int d = 0; d < D; d += n) store(query + d, load_as<A>(q + d) * scale);
  A top = std::numeric_limits<A>::lowest();
  Vec<A> l{};
  for (int64_t first = 0; first < T; first += KEYS) {
    const int count = int(std::min<int64_t>(KEYS, T - first));
    Vec<A> high = splat(top);
    for (int j = 0; j < count; j += n) {
      Vec<A> s = scores<S, A>(query, k + (first + j) * k_stride, k_stride, count - j, D);
      for (int i = std::max(0, count - j); i < n; i++) s[i] = -std::numeric_limits<A>::infinity();
      store(p + j, s);
      high = larger<A>(s, high);
    }
    const A old = top;
    top = largest_lane<A>(high);
    const A factor = exp_negative(splat(old - top))[0];
    l *= factor;
    for (int j = 0; j < count; j += n) {
      Vec<A> e = exp_negative(load(p + j) - top);
      l += e;
      store(p + j, e);
    }
    for (int d = 0; d < D; d += 4 * n) {
      const int panels = std::min(4, (D - d) / n);
      Vec<A> sum[4];
      UNROLL for (int x = 0; x < 4; x++) sum[x] = x < panels ? load(sums + d + x * n) * factor : Vec<A>{};
      const S* row = v + first * v_stride + d;
      if (panels == 4)
        for (int j = 0; j < count; j++, row += v_stride)
          UNROLL for (int x = 0; x < 4; x++) sum[x] += p[j] * load_as<A>(row + x * n);
      else
        for (int j = 0; j < count; j++, row += v_stride)
          for (int x = 0; x < panels; x++) sum[x] += p[j] * load_as<A>(row + x * n);
      UNROLL for (int x = 0; x < 4; x++) if (x < panels) store(sums + d + x * n, sum[x]);
    }
  }
  const A inverse = 1 / sum_lanes<A>(l);
  for (int d = 0; d < D; d += n) store_as<A>(out + d, load(sums + d) * inverse);
}

// Dropout on the residual stream, with the same mask: element `column` of row `row`, of head 0.

template <class S, class A> void dropout_add(int64_t rows, int64_t width, const S* x, const S* residual, S* out,
                                             const Dropout& dropout) {
  constexpr int n = LANES<A>;
  const Vec<A> scale = splat(A(dropout.keep_scale));
  const int64_t rows_a_task = std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(1, width));
  for_each_task((rows + rows_a_task - 1) / rows_a_task, [&](int64_t task) {
    for (int64_t row = task * rows_a_task; row < std::min(rows, (task + 1) * rows_a_task); row++) {
      uint32_t keys[1][2];
      dropout.row_keys(keys, 0, row, 1);
      for (int64_t column = 0; column < width; column += KEYS) {
        IntVec<A> keep[KEYS / n];
        dropout.mask<A>(keep, keys[0], column);
        const int64_t at = row * width + column, columns = std::min<int64_t>(KEYS, width - column);
        S in[KEYS] = {}, base[KEYS] = {}, result[KEYS];  // the end of a row whose width is not a multiple of KEYS
        const bool whole = columns == KEYS;
        if (!whole) {
          std::memcpy(in, x + at, columns * sizeof(S));
          if (residual) std::memcpy(base, residual + at, columns * sizeof(S));
        }
        const S* from = whole ? x + at : in;
        const S* plus = whole ? residual + at : base;
        S* to = whole ? out + at : result;
        UNROLL for (int v = 0; v < KEYS / n; v++) {
          Vec<A> y = where<A>(keep[v], load_as<A>(from + v * n) * scale);
          if (residual) y += load_as<A>(plus + v * n);
          store_as<A>(to + v * n, y);
        }
        if (!whole) std::memcpy(out + at, result, columns * sizeof(S));
      }
    }
  });
}

// GELU in its tanh form: gelu(x) = x / 2 (1 + tanh(u / 2)) = x s, with u = 2 sqrt(2 / pi) (x + 0.044715 x^3) and
// s = 1 / (1 + exp(-u)). With e = exp(-|u|), which cannot overflow, s is 1 / (1 + e) or e / (1 + e) by the sign of u, and
// its derivative is u' e / (1 + e)^2.
template <class A, bool gradient> INLINE Vec<A> gelu(Vec<A> x) {
  constexpr double k = 1.5957691216057308;
  const Vec<A> squared = x * x < A(1e4) ? x * x : splat(A(1e4));  // beyond, e is 0 all the same, and inf * 0 is not
  const Vec<A> u = x * (squared * A(k * 0.044715) + A(k));
  const Vec<A> e = exp_negative(u < A(0) ? u : -u), inverse = A(1) / (e + A(1));
  const Vec<A> s = u < A(0) ? e * inverse : inverse;
  if constexpr (!gradient) return x * s;
  return s + x * (squared * A(3 * k * 0.044715) + A(k)) * e * inverse * inverse;
}

// out = gelu(x), or grad * gelu'(x) where there is a grad.
template <class S, class A> void gelu(int64_t count, const S* x, const S* grad, S* out) {
  constexpr int n = LANES<A>;
  constexpr int64_t piece = 1 << 14;
  for_each_task((count + piece - 1) / piece, [&](int64_t task) {
    const int64_t end = std::min(count, (task + 1) * piece);
    int64_t i = task * piece;
    auto element = [&](const S* x, const S* grad, S* out) {
      store_as<A>(out, grad ? load_as<A>(grad) * gelu<A, true>(load_as<A>(x)) : gelu<A, false>(load_as<A>(x)));
    };
    for (; i + n <= end; i += n) element(x + i, grad ? grad + i : nullptr, out + i);
    if (i == end) return;
    S last[n] = {}, last_grad[n] = {}, result[n];
    std::memcpy(last, x + i, (end - i) * sizeof(S));
    if (grad) std::memcpy(last_grad, grad + i, (end - i) * sizeof(S));
    element(last, grad ? last_grad : nullptr, result);
    std::memcpy(out + i, result, (end - i) * sizeof(S));
  });
}

// Products of few rows, as in generation: up to FEW rows of x times weights that are far larger than the cache.
//
// What bounds them is reading the weights once, and a general matrix product, made for many rows, does that far below the
// rate of memory. Here all rows of x meet a weight while it is in a register or in L1, and weights are read in long
// stretches, a few side by side. What is added up and in which order depends on K alone: not on threads or other rows.

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
  const int64_t stride = K + 16;  // at a multiple of the page size, all rows of x would compete for the same cache lines
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

// Calls f(M) with M as a constant of the compiler's.
template <class F, size_t... i> void with_rows(int64_t M, const F& f, std::index_sequence<i...>) {
  ((M == int64_t(i) + 1 ? f(std::integral_constant<int, int(i) + 1>{}) : void()), ...);
}

template <class F> int dispatch(int dtype, const F& f) {
  try {
    switch (dtype) {
      case 0: f((float*)nullptr, (float*)nullptr); return 0;
      case 1: f((BFloat16*)nullptr, (float*)nullptr); return 0;
      case 2: f((double*)nullptr, (double*)nullptr); return 0;
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 2;
}

}  // namespace

// The interface, called through ctypes. dtype: 0 float32, 1 bfloat16, 2 float64; strides count elements and the last one is
// 1; seed is null without dropout. Returns 0, or 1 when memory ran out.
extern "C" {

int minigpt2_attention(int dtype, int64_t B, int64_t T, int64_t H, int64_t D, const void* qkv, int64_t batch_stride,
                       int64_t row_stride, void* out, void* lse, double p, const int64_t* seed) {
  return dispatch(dtype, [&](auto* s, auto* a) {
    forward<std::decay_t<decltype(*s)>, std::decay_t<decltype(*a)>>({B, T, H, int(D)}, qkv, batch_stride, row_stride,
                                                                    out, lse, Dropout(p, seed));
  });
}

int minigpt2_attention_backward(int dtype, int64_t B, int64_t T, int64_t H, int64_t D, const void* qkv,
                                int64_t batch_stride, int64_t row_stride, const void* grad_out,
                                int64_t grad_out_batch_stride, int64_t grad_out_row_stride, const void* out,
                                const void* lse, void* grad_qkv, double p, const int64_t* seed) {
  return dispatch(dtype, [&](auto* s, auto* a) {
    backward<std::decay_t<decltype(*s)>, std::decay_t<decltype(*a)>>({B, T, H, int(D)}, qkv, batch_stride, row_stride,
                                                                     grad_out, grad_out_batch_stride,
                                                                     grad_out_row_stride, out, lse, grad_qkv,
                                                                     Dropout(p, seed));
  });
}

int minigpt2_dropout_add(int dtype, int64_t rows, int64_t width, const void* x, const void* residual, void* out,
                         double p, const int64_t* seed) {
  return dispatch(dtype, [&](auto* s, auto* a) {
    using S = std::decay_t<decltype(*s)>;
    dropout_add<S, std::decay_t<decltype(*a)>>(rows, width, static_cast<const S*>(x), static_cast<const S*>(residual),
                                               static_cast<S*>(out), Dropout(p, seed));
  });
}

int minigpt2_gelu(int dtype, int64_t count, const void* x, const void* grad, void* out) {
  return dispatch(dtype, [&](auto* s, auto* a) {
    using S = std::decay_t<decltype(*s)>;
    gelu<S, std::decay_t<decltype(*a)>>(count, static_cast<const S*>(x), static_cast<const S*>(grad),
                                        static_cast<S*>(out));
  });
}

int minigpt2_decode(int dtype, int64_t B, int64_t T, int64_t H, int64_t D, const void* q, int64_t q_batch,
                    int64_t q_head, const void* k, int64_t k_batch, int64_t k_head, int64_t k_row, const void* v,
                    int64_t v_batch, int64_t v_head, int64_t v_row, void* out) {
  return dispatch(dtype, [&](auto* s, auto* a) {
    using S = std::decay_t<decltype(*s)>;
    using A = std::decay_t<decltype(*a)>;
    auto head = [&](int64_t h) {
      const int64_t b = h / H, i = h % H;
      decode_head<S, A>(static_cast<const S*>(q) + b * q_batch + i * q_head,
                        static_cast<const S*>(k) + b * k_batch + i * k_head, k_row,
                        static_cast<const S*>(v) + b * v_batch + i * v_head, v_row, static_cast<S*>(out) + h * D, T,
                        int(D));
    };
    if (B * H * T * D < 1 << 16)  // a few microseconds: waking the other threads would take as long
      for (int64_t h = 0; h < B * H; h++) head(h);
    else
      for_each_task(B * H, head);
  });
}

// weights float32, contiguous: (K, N) with a bias, or (N, K) without one; M from 1 to FEW.
int minigpt2_few_rows(int64_t M, int64_t K, int64_t N, const float* x, int64_t x_stride, const float* weights,
                      const float* bias, float* out) {
  return dispatch(0, [&](auto*, auto*) {
    auto run = [&](auto m) {
      if (bias) few_rows<m()>(K, N, x, x_stride, weights, bias, out);
      else few_rows_transposed<m()>(K, N, x, x_stride, weights, out);
    };
    with_rows(M, run, std::make_index_sequence<FEW>{});
  });
}
}
