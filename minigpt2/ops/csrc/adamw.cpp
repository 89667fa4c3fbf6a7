// AdamW in float32 with moments in fewer bits (../adamw.py says which and how), one row of a matrix at a time: the
// row's moments become float32, move the weights, and are rounded back at random, by blocks.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "dropout.h"
#include "interface.h"
#include "simd.h"
#include "tasks.h"

using namespace minigpt2;

namespace {

using F = Vec<float>;
using W = WordVec<float>;
constexpr int LANE = LANES<float>, BLOCK = 64;  // BLOCK elements of a row have one scale

template <class To, class From> INLINE To bit_cast(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
INLINE W words(uint32_t x) { return x - W{}; }
// The first n elements from memory, and to it; n is LANE but at the end of a row.
template <class V, class X> INLINE V load_some(const X* p, int64_t n) {
  typedef X Memory __attribute__((vector_size(LANE * sizeof(X))));
  Memory x{};
  if (n == LANE) std::memcpy(&x, p, sizeof x);
  else std::memcpy(&x, p, n * sizeof(X));
  return __builtin_convertvector(x, V);
}
template <class X, class V> INLINE void store_some(X* p, V v, int64_t n) {
  typedef X Memory __attribute__((vector_size(LANE * sizeof(X))));
  const Memory x = __builtin_convertvector(v, Memory);
  if (n == LANE) std::memcpy(p, &x, sizeof x);
  else std::memcpy(p, &x, n * sizeof(X));
}
INLINE F square_root(F x) {
  UNROLL for (int i = 0; i < LANE; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// How a moment lies in memory. decode: its value over the block's scale. encode: the same back, `random` being 32 bits.
struct Half {  // bfloat16, which needs no scale
  using Stored = uint16_t;
  static constexpr bool scaled = false;
  static F decode(W code) { return bit_cast<F>(code << 16); }
  static W encode(F x, W random) { return (bit_cast<W>(x) + (random & 0xffff)) >> 16; }
};
template <uint32_t largest> struct Byte {  // a float of four bits of fraction, the largest being 1
  using Stored = uint8_t;
  static constexpr bool scaled = true, is_signed = largest < 128;
  static constexpr int fraction = 4, shift = 23 - fraction;
  static constexpr uint32_t base = (127 << fraction) - largest, mask = (1 << shift) - 1;
  static F decode(W code) {
    const W size = code & largest;
    const W bits = (size ? (size + base) << shift : words(0)) | (is_signed ? (code & 0x80) << 24 : words(0));
    return bit_cast<F>(bits);
  }
  static W encode(F x, W random) {
    const W bits = bit_cast<W>(x) & 0x7fffffff, sign = bit_cast<W>(x) >> 31 << 7;
    const W rounded = (bits + (random & mask)) >> shift;
    const F least = bit_cast<F>(words((base + 1) << shift));
    const F share = bit_cast<F>(bits) * (float(mask + 1) / least[0]);  // of the least, in `mask + 1`ths
    const W below = is_signed ? W(share > __builtin_convertvector(random & mask, F)) & 1 : W(bits != 0) & 1;
    W size = bit_cast<F>(bits) < least ? below : rounded - base;
    size = size > largest ? words(largest) : size;
    return is_signed ? size | sign : size;
  }
};

struct Step {
  float rate, beta1, beta2, eps, keep, correction1, correction2;  // keep: what decay leaves of a weight
};

template <class First, class Second>
void adamw(int64_t rows, int64_t columns, float* p, const float* grad, typename First::Stored* first,
           typename Second::Stored* second, float* first_scale, float* second_scale, const Step& step, uint32_t seed,
           int64_t first_row) {
  const int64_t rows_a_task = std::max<int64_t>(1, (int64_t{1} << 16) / columns);
  const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
  const F step_size = splat(step.rate / step.correction1), root = splat(std::sqrt(step.correction2));
  W lane;
  UNROLL for (int j = 0; j < LANE; j++) lane[j] = j;
  for_each_task((rows + rows_a_task - 1) / rows_a_task, [&](int64_t task) {
    scratch.reserve(2 * blocks * BLOCK * sizeof(float) + 128);
    float *m = scratch.take<float>(blocks * BLOCK), *v = scratch.take<float>(blocks * BLOCK);
    for (int64_t row = task * rows_a_task; row < std::min(rows, (task + 1) * rows_a_task); row++) {
      const int64_t start = row * columns;
      float *scale1 = First::scaled ? first_scale + row * blocks : nullptr;
      float *scale2 = Second::scaled ? second_scale + row * blocks : nullptr;
      for (int64_t block = 0; block < blocks; block++) {
        const float old1 = First::scaled ? scale1[block] : 1, old2 = Second::scaled ? scale2[block] : 1;
        F most1{}, most2{};
        for (int64_t i = block * BLOCK; i < std::min(columns, (block + 1) * BLOCK); i += LANE) {
          const int64_t n = std::min<int64_t>(LANE, columns - i);
          F w = load_some<F>(p + start + i, n);
          const F g = load_some<F>(grad + start + i, n);
          const W a = load_some<W>(first + start + i, n), b = load_some<W>(second + start + i, n);
          const F m1 = First::decode(a) * old1, v1 = Second::decode(b) * old2;
          const F m2 = m1 * step.beta1 + g * (1 - step.beta1), v2 = v1 * step.beta2 + g * g * (1 - step.beta2);
          store(m + i, m2);
          store(v + i, v2);
          most1 = larger<float>(m2 < 0.0f ? -m2 : m2, most1);
          most2 = larger<float>(v2, most2);
          w = w * step.keep - step_size * m2 / (square_root(v2) / root + step.eps);
          store_some(p + start + i, w, n);
        }
        if (First::scaled) scale1[block] = largest_lane<float>(most1);
        if (Second::scaled) scale2[block] = largest_lane<float>(most2);
      }
      const uint32_t key = mix(mix(seed) ^ uint32_t(first_row + row));
      for (int64_t block = 0; block < blocks; block++) {
        const float new1 = First::scaled ? scale1[block] : 1, new2 = Second::scaled ? scale2[block] : 1;
        const float inverse1 = new1 > 0 ? 1 / new1 : 0, inverse2 = new2 > 0 ? 1 / new2 : 0;
        for (int64_t i = block * BLOCK; i < std::min(columns, (block + 1) * BLOCK); i += LANE) {
          const int64_t n = std::min<int64_t>(LANE, columns - i);
          W x = (lane + uint32_t(i)) * 0x9e3779b9u + key;
          x ^= x >> 16;
          x *= 0x7feb352du;
          x ^= x >> 15;
          x *= 0x846ca68bu;
          x ^= x >> 16;
          W y = x * 0x2c1b3c6du;
          y ^= y >> 12;
          const W a = First::encode(load(m + i) * inverse1, x), b = Second::encode(load(v + i) * inverse2, y);
          store_some(first + start + i, a, n);
          store_some(second + start + i, b, n);
        }
      }
    }
  });
}

}  // namespace

EXPORT int minigpt2_adamw(int bytes, int64_t rows, int64_t columns, float* p, const float* grad, void* first,
                          void* second, float* first_scale, float* second_scale, const double* numbers, uint32_t seed,
                          int64_t first_row) {
  const Step step{float(numbers[0]), float(numbers[1]), float(numbers[2]), float(numbers[3]),
                  float(numbers[4]), float(numbers[5]), float(numbers[6])};
  try {
    auto call = [&]<class First, class Second>() {
      adamw<First, Second>(rows, columns, p, grad, static_cast<typename First::Stored*>(first),
                           static_cast<typename Second::Stored*>(second), first_scale, second_scale, step, seed,
                           first_row);
    };
    if (bytes == 2) call.template operator()<Half, Half>();
    else call.template operator()<Byte<127>, Byte<255>>();
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
  return DONE;
}
