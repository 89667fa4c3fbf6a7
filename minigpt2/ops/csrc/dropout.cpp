// Dropout on the way into the residual stream: out = residual + dropout(x), in one pass.
//
// The mask is that of attention (dropout.h), where element `column` of row `row` is taken for one of head 0.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dropout.h"
#include "interface.h"
#include "simd.h"
#include "tasks.h"

using namespace minigpt2;

namespace {

template <class S, class A> void dropout_add(int64_t rows, int64_t width, const S* x, const S* residual, S* out,
                                             const Dropout& dropout) {
  constexpr int n = LANES<A>;
  const Vec<A> scale = splat(A(dropout.keep_scale));
  const int64_t rows_a_task = std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(1, width));
  for_each_task((rows + rows_a_task - 1) / rows_a_task, [&](int64_t task) {
    for (int64_t row = task * rows_a_task; row < std::min(rows, (task + 1) * rows_a_task); row++) {
      uint32_t keys[1][2];
      dropout.row_keys(keys, 0, row, 1);
      for (int64_t column = 0; column < width; column += MASK_COLUMNS) {
        IntVec<A> keep[MASK_COLUMNS / n];
        dropout.mask<A>(keep, keys[0], column);
        const int64_t at = row * width + column, columns = std::min<int64_t>(MASK_COLUMNS, width - column);
        S in[MASK_COLUMNS] = {}, base[MASK_COLUMNS] = {}, result[MASK_COLUMNS];  // for the last columns of a row
        const bool whole = columns == MASK_COLUMNS;
        if (!whole) {
          std::memcpy(in, x + at, columns * sizeof(S));
          if (residual) std::memcpy(base, residual + at, columns * sizeof(S));
        }
        const S* from = whole ? x + at : in;
        const S* plus = whole && residual ? residual + at : base;
        S* to = whole ? out + at : result;
        UNROLL for (int v = 0; v < MASK_COLUMNS / n; v++) {
          Vec<A> y = where<A>(keep[v], load_as<A>(from + v * n) * scale);
          if (residual) y += load_as<A>(plus + v * n);
          store_as<A>(to + v * n, y);
        }
        if (!whole) std::memcpy(out + at, result, columns * sizeof(S));
      }
    }
  });
}

}  // namespace

EXPORT int minigpt2_dropout_add(int dtype, int64_t rows, int64_t width, const void* x, const void* residual, void* out,
                                double p, const int64_t* seed) {
  return dispatch(dtype, [&]<class S, class A>() {
    dropout_add<S, A>(rows, width, static_cast<const S*>(x), static_cast<const S*>(residual), static_cast<S*>(out),
                      Dropout(p, seed));
  });
}
