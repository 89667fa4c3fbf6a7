// Attention of one query over a cache of keys and values, as in generation: softmax(scale q k^T) v.
//
// Keys come in tiles. m, l and O are the running maximum, sum and output of the softmax, as in attention.cpp.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "interface.h"
#include "simd.h"
#include "tasks.h"

using namespace minigpt2;

namespace {

constexpr int KEYS = 64;  // of a tile
constexpr int MAX_D = 256;

// The scores of LANES keys at once: partial products by lane, then a transpose turns sums across lanes into sums of
// vectors.
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
void decode_head(const S* q, const S* k, int64_t k_stride, const S* v, int64_t v_stride, S* out, int64_t T, int D,
                 A scale) {
  constexpr int n = LANES<A>;
  alignas(64) A query[MAX_D], O[MAX_D] = {}, p[KEYS];
  for (int d = 0; d < D; d += n) store(query + d, load_as<A>(q + d) * scale);
  A m = std::numeric_limits<A>::lowest();
  Vec<A> l{};
  for (int64_t first = 0; first < T; first += KEYS) {
    const int count = int(std::min<int64_t>(KEYS, T - first));
    Vec<A> high = splat(m);
    for (int j = 0; j < count; j += n) {
      Vec<A> s = scores<S, A>(query, k + (first + j) * k_stride, k_stride, count - j, D);
      for (int i = std::max(0, count - j); i < n; i++) s[i] = -std::numeric_limits<A>::infinity();
      store(p + j, s);
      high = larger<A>(s, high);
    }
    const A old = m;
    m = largest_lane<A>(high);
    const A factor = exp_negative(splat(old - m))[0];
    l *= factor;
    for (int j = 0; j < count; j += n) {
      Vec<A> e = exp_negative(load(p + j) - m);
      l += e;
      store(p + j, e);
    }
    for (int d = 0; d < D; d += 4 * n) {
      const int panels = std::min(4, (D - d) / n);
      Vec<A> sum[4];
      UNROLL for (int x = 0; x < 4; x++) sum[x] = x < panels ? load(O + d + x * n) * factor : Vec<A>{};
      const S* row = v + first * v_stride + d;
      if (panels == 4)
        for (int j = 0; j < count; j++, row += v_stride)
          UNROLL for (int x = 0; x < 4; x++) sum[x] += p[j] * load_as<A>(row + x * n);
      else
        for (int j = 0; j < count; j++, row += v_stride)
          for (int x = 0; x < panels; x++) sum[x] += p[j] * load_as<A>(row + x * n);
      UNROLL for (int x = 0; x < 4; x++) if (x < panels) store(O + d + x * n, sum[x]);
    }
  }
  const A inverse = 1 / sum_lanes<A>(l);
  for (int d = 0; d < D; d += n) store_as<A>(out + d, load(O + d) * inverse);
}

// Calls f(batch, head) for all of them.
template <class F> void for_each_head(int64_t B, int64_t T, int64_t H, int64_t D, const F& f) {
  if (B * H * T * D < 1 << 16)  // a few microseconds: waking the other threads would take as long
    for (int64_t h = 0; h < B * H; h++) f(h / H, h % H);
  else
    for_each_task(B * H, [&](int64_t h) { f(h / H, h % H); });
}

}  // namespace

// q (B, H, D), k and v (B, H, T, D), out (B, H, D) contiguous; D is a multiple of 16, up to MAX_D.
EXPORT int minigpt2_decode(int dtype, int64_t B, int64_t T, int64_t H, int64_t D, double scale, const void* q,
                           int64_t q_batch, int64_t q_head, const void* k, int64_t k_batch, int64_t k_head,
                           int64_t k_row, const void* v, int64_t v_batch, int64_t v_head, int64_t v_row, void* out) {
  return dispatch(dtype, [&]<class S, class A>() {
    for_each_head(B, T, H, D, [&](int64_t b, int64_t i) {
      decode_head<S, A>(static_cast<const S*>(q) + b * q_batch + i * q_head,
                        static_cast<const S*>(k) + b * k_batch + i * k_head, k_row,
                        static_cast<const S*>(v) + b * v_batch + i * v_head, v_row,
                        static_cast<S*>(out) + (b * H + i) * D, T, int(D), A(scale));
    });
  });
}

// The same for qkv (B, 3, H, D) contiguous, whose keys and values become the T-th of the caches k and v (B, H, room, D),
// contiguous too.
int minigpt2::decode_packed(int dtype, int64_t B, int64_t T, int64_t H, int64_t D, double scale, const void* qkv,
                            void* k, void* v, int64_t room, void* out) {
  return dispatch(dtype, [&]<class S, class A>() {
    for_each_head(B, T, H, D, [&](int64_t b, int64_t i) {
      const S* q = static_cast<const S*>(qkv) + (3 * b * H + i) * D;
      S* keys = static_cast<S*>(k) + (b * H + i) * room * D;
      S* values = static_cast<S*>(v) + (b * H + i) * room * D;
      std::memcpy(keys + (T - 1) * D, q + H * D, D * sizeof(S));
      std::memcpy(values + (T - 1) * D, q + 2 * H * D, D * sizeof(S));
      decode_head<S, A>(q, keys, D, values, D, static_cast<S*>(out) + (b * H + i) * D, T, int(D), A(scale));
    });
  });
}
