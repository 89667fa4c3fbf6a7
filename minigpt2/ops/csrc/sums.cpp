// The sums of the columns of a matrix: the gradient of a bias.

#include <algorithm>
#include <cstdint>
#include <new>

#include "interface.h"
#include "simd.h"
#include "tasks.h"

using namespace minigpt2;

namespace {

constexpr int64_t BAND = 128;  // rows of a task
constexpr int STREAMS = 4;     // of which so many are read side by side

// sums += `count` elements of each of R rows.
template <int R, class S, class A> void add_rows(A* sums, const S* x, int64_t stride, int64_t count) {
  constexpr int n = LANES<A>;
  int64_t j = 0;
  for (; j + n <= count; j += n) {
    Vec<A> sum = load_as<A>(x + j);
    UNROLL for (int i = 1; i < R; i++) sum += load_as<A>(x + i * stride + j);
    store(sums + j, load(sums + j) + sum);
  }
  if (j == count) return;
  A lanes[n] = {};
  for (int i = 0; i < R; i++) {
    S padded[n] = {};
    std::copy_n(x + i * stride + j, count - j, padded);
    store(lanes, load(lanes) + load_as<A>(padded));
  }
  for (int i = 0; j < count; i++, j++) sums[j] += lanes[i];
}

}  // namespace

// out (columns), of the type of the arithmetic, = the sums over the rows of x (rows x columns). What is added up, and
// in which order, depends on the number of rows alone.
EXPORT int minigpt2_column_sums(int dtype, int64_t rows, int64_t columns, const void* x, int64_t stride, void* out) {
  return dispatch(dtype, [&]<class S, class A>() {
    const int64_t bands = (rows + BAND - 1) / BAND;
    static thread_local Scratch memory;
    memory.reserve(sizeof(A) * bands * columns);
    A* const partial = memory.take<A>(bands * columns);
    for_each_task(bands, [&](int64_t band) {
      A* const sums = partial + band * columns;
      std::fill_n(sums, columns, A{});
      const S* from = static_cast<const S*>(x) + band * BAND * stride;
      int64_t left = std::min(BAND, rows - band * BAND);
      for (; left >= STREAMS; left -= STREAMS, from += STREAMS * stride) add_rows<STREAMS>(sums, from, stride, columns);
      for (; left > 0; left--, from += stride) add_rows<1>(sums, from, stride, columns);
    });
    std::fill_n(static_cast<A*>(out), columns, A{});
    for (int64_t band = 0; band < bands; band++)
      add_rows<1>(static_cast<A*>(out), partial + band * columns, columns, columns);
  });
}
