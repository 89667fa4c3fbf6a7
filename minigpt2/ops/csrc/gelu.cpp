// GELU in its tanh form, and its derivative, in one pass each.
//
//   gelu(x) = x / 2 (1 + tanh(u / 2)) = x s,  where u = 2 sqrt(2 / pi) (x + 0.044715 x^3) and s = 1 / (1 + exp(-u))
//
// With e = exp(-|u|), which cannot overflow, s is 1 / (1 + e) or e / (1 + e) by the sign of u, and its derivative is
// u' e / (1 + e)^2.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "interface.h"
#include "simd.h"
#include "tasks.h"

using namespace minigpt2;

namespace {

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

}  // namespace

EXPORT int minigpt2_gelu(int dtype, int64_t count, const void* x, const void* grad, void* out) {
  return dispatch(dtype, [&]<class S, class A>() {
    gelu<S, A>(count, static_cast<const S*>(x), static_cast<const S*>(grad), static_cast<S*>(out));
  });
}
