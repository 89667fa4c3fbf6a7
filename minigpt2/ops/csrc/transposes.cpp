// Transposes of bfloat16 matrices for the products of training (../products.py), by squares in registers.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <new>

#include "interface.h"
#include "operand.h"
#include "simd.h"
#include "tasks.h"

using namespace minigpt2;

namespace {

constexpr int n = LANES<float>;
constexpr int BAND = 32;  // columns of a task: a cache line of each row

// Calls f(i, j) for each part of a matrix, of height x n, that begins in row i and column j.
template <class F> Status for_each_part(int64_t rows, int height, int64_t columns, const F& f) {
  try {
    for_each_task((columns + BAND - 1) / BAND, [&](int64_t band) {
      const int64_t end = std::min(columns, (band + 1) * BAND);
      for (int64_t i = 0; i < rows; i += height)
        for (int64_t j = band * BAND; j < end; j += n) f(i, j);
    });
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
  return DONE;
}

}  // namespace

// to (columns x padded), bfloat16, = the transpose of from (rows x columns), then zeros; padded: a multiple of 2 n.
EXPORT int minigpt2_transposed(int64_t rows, int64_t padded, int64_t columns, const BFloat16* from, int64_t stride,
                               BFloat16* to, int64_t stride_to) {
  return for_each_part(padded, 2 * n, columns, [&](int64_t i, int64_t j) {
    if (i + 2 * n > rows || j + n > columns) {
      for (int64_t column = j; column < std::min(j + n, columns); column++)
        for (int64_t row = i; row < i + 2 * n; row++)
          to[column * stride_to + row] = row < rows ? from[row * stride + column] : BFloat16{};
      return;
    }
    Vec<Pair> square[n];  // of pairs of numbers from neighbouring rows, the first in the low halves
    UNROLL for (int k = 0; k < n; k++) {
      const BFloat16* first = from + (i + 2 * k) * stride + j;
      square[k] = ((Vec<Pair>)load_as<float>(first) >> 16) | (Vec<Pair>)load_as<float>(first + stride);
    }
    transpose<Pair>(square);
    UNROLL for (int k = 0; k < n; k++) std::memcpy(to + (j + k) * stride_to + i, &square[k], sizeof square[k]);
  });
}

// to (columns x rows), float32, = or += the transpose of from (rows x columns).
EXPORT int minigpt2_add_transposed(int64_t rows, int64_t columns, const BFloat16* from, int64_t stride, float* to,
                                   int64_t stride_to, int add) {
  return for_each_part(rows, n, columns, [&](int64_t i, int64_t j) {
    if (i + n > rows || j + n > columns) {
      for (int64_t column = j; column < std::min(j + n, columns); column++)
        for (int64_t row = i; row < std::min(i + n, rows); row++) {
          float& sum = to[column * stride_to + row];
          sum = (add ? sum : 0) + std::bit_cast<float>(uint32_t(from[row * stride + column].bits) << 16);
        }
      return;
    }
    Vec<float> square[n];
    UNROLL for (int k = 0; k < n; k++) square[k] = load_as<float>(from + (i + k) * stride + j);
    transpose<float>(square);
    UNROLL for (int k = 0; k < n; k++) {
      float* at = to + (j + k) * stride_to + i;
      store(at, add ? load(at) + square[k] : square[k]);
    }
  });
}
