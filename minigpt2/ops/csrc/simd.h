// Vectors as wide as the processor's registers, the exponential, and the types that tensors have in memory.
//
// The vectors are an extension of the language that GCC and Clang share: one source serves AVX-512, AVX, SSE and NEON.
// Throughout, A is the type of the arithmetic, float or double, and S the type in memory, which may also be BFloat16.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE [[gnu::always_inline]] inline
#define UNROLL _Pragma("GCC unroll 16")

namespace minigpt2 {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;  // of vectors
#else
constexpr int REGISTERS = 16;
#endif
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

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

// exp(x) for x <= 0, or somewhat more (up to 80). With n = round(x / ln 2) and r = x - n ln 2 in [-0.35, 0.35], a
// polynomial of degree 5 gives e^r to 1e-7; multiplying by 2^n (not adding n to the exponent's bits) keeps a NaN a NaN.
// Below -87 the result would be subnormal: it is 0. ln 2 in one float is exact enough: it is off by 2e-9, times |n|.
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

// How elements are read from memory and written to it.

struct BFloat16 { uint16_t bits; };

template <class A> INLINE Vec<A> load_as(const A* p) { return load(p); }
template <class A> INLINE Vec<A> load_as(const BFloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  Half h;
  std::memcpy(&h, p, sizeof h);
  // Two instructions. From __builtin_convertvector GCC 12 makes five.
#if defined(__AVX512F__)
  const auto w = (WordVec<float>)_mm512_cvtepu16_epi32((__m256i)h) << 16;
#elif defined(__AVX2__)
  const auto w = (WordVec<float>)_mm256_cvtepu16_epi32((__m128i)h) << 16;
#else
  const auto w = __builtin_convertvector(h, WordVec<float>) << 16;
#endif
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

inline int round_up(int64_t n, int step) { return int((n + step - 1) / step * step); }

}  // namespace minigpt2
