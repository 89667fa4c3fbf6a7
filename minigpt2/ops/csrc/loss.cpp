// Cross-entropy of rows of logits, and its gradient in their place. Of a row z with label t
//
//   m = max(z),  l = sum(exp(z - m)),  loss = log(l) + m - z[t],  d = exp(z - m) / l - onehot(t)
//
// A row is read from memory once and written once: it stays in the cache between the passes for m, l and d.

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

// Calls f(vector, place in the row) for a row's elements; those beyond its end are -inf.
template <class S, class A, class F> INLINE void for_each_vector(S* row, int64_t width, const F& f) {
  constexpr int n = LANES<A>;
  int64_t i = 0;
  for (; i + 4 * n <= width; i += 4 * n)
    UNROLL for (int v = 0; v < 4; v++) f(v, load_as<A>(row + i + v * n), row + i + v * n);
  for (; i < width; i += n) {
    S last[n];
    store_as<A>(last, splat(-std::numeric_limits<A>::infinity()));
    const int64_t bytes = std::min<int64_t>(n, width - i) * sizeof(S);
    std::memcpy(last, row + i, bytes);
    f(0, load_as<A>(last), last);
    std::memcpy(row + i, last, bytes);
  }
}

template <class S, class A> A cross_entropy(S* row, int64_t width, int64_t label, bool gradient) {
  Vec<A> largest[4], sum[4] = {};
  UNROLL for (int v = 0; v < 4; v++) largest[v] = splat(-std::numeric_limits<A>::infinity());
  for_each_vector<S, A>(row, width, [&](int v, Vec<A> z, S*) { largest[v] = larger<A>(z, largest[v]); });
  const A m = largest_lane<A>(larger<A>(larger<A>(largest[0], largest[1]), larger<A>(largest[2], largest[3])));
  for_each_vector<S, A>(row, width, [&](int v, Vec<A> z, S*) { sum[v] += exp_negative(z - m); });  // NaN stays NaN
  const A l = sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3])), inverse = A(1) / l;
  S one[LANES<A>] = {};
  std::memcpy(one, row + label, sizeof(S));
  const A logit = load_as<A>(one)[0];
  if (gradient) {
    for_each_vector<S, A>(row, width,
                          [&](int, Vec<A> z, S* to) { store_as<A>(to, exp_negative(z - m) * inverse); });
    store_as<A>(one, splat(A(std::exp(logit - m) * inverse - A(1))));
    std::memcpy(row + label, one, sizeof(S));
  }
  return std::log(l) + (m - logit);
}

}  // namespace

EXPORT int minigpt2_cross_entropy(int dtype, int64_t rows, int64_t width, void* logits, int64_t stride,
                                  const int64_t* labels, void* losses, int gradient) {
  return dispatch(dtype, [&]<class S, class A>() {
    for_each_task(rows, [&](int64_t i) {
      S* row = static_cast<S*>(logits) + i * stride;
      static_cast<A*>(losses)[i] = cross_entropy<S, A>(row, width, labels[i], gradient);
    });
  });
}
