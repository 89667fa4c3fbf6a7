// Copies of a tile of rows as the products of attention read it, in words of W (operand.h).

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dropout.h"
#include "operand.h"
#include "simd.h"

namespace minigpt2 {

constexpr int KEYS = MASK_COLUMNS;  // of a tile: a strip of scores is 1.5 KB, or 8 KB on AMX, K^T and V 16 KB each

// to (padded x D, along its rows) = rows of from, then zeros.
template <class W, class S> void copy_along(W* to, const S* from, int64_t stride, int rows, int padded, int D) {
  const int words = D / DEPTH<W>;
  for (int i = 0; i < rows; i++, to += words, from += stride) {
    if constexpr (DEPTH<W> == 2)
      std::memcpy(to, from, sizeof(S) * D);
    else
      for (int d = 0; d < D; d += LANES<W>) store(to + d, load_as<W>(from + d));
  }
  std::memset(to, 0, sizeof(W) * size_t(padded - rows) * words);
}

// The same, across its rows; padded is a multiple of DEPTH.
template <class W, class S> void copy_across(W* to, const S* from, int64_t stride, int rows, int padded, int D) {
  constexpr int depth = DEPTH<W>;
  int i = 0;
  for (; i < rows; i += depth, to += D, from += depth * stride)
    for (int d = 0; d < D; d += LANES<W>)
      store(to + d, load_across<W>(from + d, i + 1 < rows ? from + stride + d : nullptr));
  std::memset(to, 0, sizeof(W) * size_t((padded - i) / depth) * D);
}

// to (D x KEYS, across its rows) = scale * the transpose of up to KEYS rows of from, then zeros. Pairs take no scale:
// it would round them.
template <class W, class S>
void copy_transposed(W* to, const S* from, int64_t stride, int rows, int D, [[maybe_unused]] Sum<W> scale) {
  constexpr int n = LANES<W>, depth = DEPTH<W>;
  const int words = D / depth;
  for (int key = 0; key < KEYS; key += n)
    for (int d = 0; d < words; d += n) {
      Vec<W> square[n];
      UNROLL for (int i = 0; i < n; i++)
        square[i] = key + i < rows ? load_along<W>(from + (key + i) * stride + d * depth, words - d) : Vec<W>{};
      if constexpr (depth == 1)
        UNROLL for (int i = 0; i < n; i++) square[i] *= scale;
      transpose<W>(square);
      UNROLL for (int i = 0; i < n; i++)
        if (depth == 1 || d + i < words) store(to + (d + i) * KEYS + key, square[i]);
    }
}

// to (D x padded, along its rows) = the transpose of rows of from, then zeros. stride_to counts words.
template <class S>
void copy_turned(Pair* to, ptrdiff_t stride_to, const S* from, int64_t stride, int rows, int padded, int D) {
  constexpr int n = LANES<Pair>;
  for (int k = 0; k < padded / 2; k += n)
    for (int d = 0; d < D; d += n) {
      Vec<Pair> square[n];
      UNROLL for (int i = 0; i < n; i++) {
        const int row = 2 * (k + i);
        const S* at = from + std::min(row, rows - 1) * stride + d;
        square[i] = row < rows ? load_across<Pair>(at, row + 1 < rows ? at + stride : nullptr) : Vec<Pair>{};
      }
      transpose<Pair>(square);
      UNROLL for (int i = 0; i < n; i++) store(to + (d + i) * stride_to + k, square[i]);
    }
}

// to = factor * the transpose of from (D x KEYS), for up to KEYS rows.
template <class S>
void write_turned(S* to, int64_t stride, const float* from, int rows, int D, float factor) {
  constexpr int n = LANES<float>;
  for (int row = 0; row < rows; row += n)
    for (int d = 0; d < D; d += n) {
      Vec<float> square[n];
      UNROLL for (int i = 0; i < n; i++) square[i] = load(from + (d + i) * KEYS + row);
      transpose<float>(square);
      for (int i = 0; i < n && row + i < rows; i++) store_as<float>(to + (row + i) * stride + d, square[i] * factor);
    }
}

// Whether all numbers are finite.
template <class A, class S> bool finite(const S* from, int64_t stride, int rows, int D) {
  Vec<A> sum{};  // of zeros, or of what times 0 is not zero
  for (int i = 0; i < rows; i++)
    for (int d = 0; d < D; d += LANES<A>) sum += load_as<A>(from + i * stride + d) * A(0);
  return sum_lanes<A>(sum) == A(0);
}

}  // namespace minigpt2
