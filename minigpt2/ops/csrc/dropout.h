// The dropout mask of attention and of the residual stream.
//
// It is a pure function of (seed, b * H + h, row, column), in 32-bit unsigned arithmetic that wraps around:
//   mix(x):        x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16
//   key(c):        mix(mix(mix(mix(low word of seed + c) ^ high word of seed) + (b * H + h)) ^ row)
//   key0, key1:    key(0x9e3779b9), key(0x85ebca6b): 64 bits a row, so that rows do not share stretches of mask
//   word(w):       x = w * 0x9e3779b9 + key0; x ^= x >> 16; x *= 0x7feb352d; x += key1;
//                  x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16
//   value(column): 16 bits of word(column / 32 * 16 + column % 16), the low if column % 32 < 16, else the high
// and an element is kept where value >= round(p * 65536), so that the rate is p to within 1 / 131072. What is kept is
// scaled by 1 / (1 - p), as PyTorch does. mix is lowbias32 (Wellons 2018, https://nullprogram.com/blog/2018/07/31/);
// 0x9e3779b9 is the fraction of the golden ratio, and 0x85ebca6b is from MurmurHash3.

#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace minigpt2 {

constexpr int MASK_COLUMNS = 64;  // which one call makes

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
  template <class A> INLINE void mask(IntVec<A> (&keep)[MASK_COLUMNS / LANES<A>], const uint32_t (&row_key)[2],
                                      int64_t first_column) const {
    constexpr int n = LANES<A>;
    static_assert(16 % n == 0);
    WordVec<A> lane;
    UNROLL for (int i = 0; i < n; i++) lane[i] = i;
    UNROLL for (int column = 0; column < MASK_COLUMNS; column += 32) {
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

}  // namespace minigpt2
