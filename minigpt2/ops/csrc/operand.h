// What a matrix product multiplies at a time, and how the numbers of its operands lie for that.
//
// A processor with AVX-512 BF16 multiplies bfloat16 in pairs: it takes two numbers of each operand, neighbours in the
// dimension that is summed over, and adds both products to a float. An operand is then a matrix of such pairs, and
// elsewhere one of numbers. Throughout, W is a word of an operand, a Pair or the type A of the arithmetic, and DEPTH
// says how many numbers it holds.
//
// A matrix of words lies `along` its rows if the numbers of a word are of one row and neighbouring columns, and
// `across` them if they are of neighbouring rows and one column. Where a word is one number the two are the same.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace minigpt2 {

struct Pair { uint32_t bits; };  // the first number in the low half
template <> struct Simd<Pair> { typedef typename Simd<float>::Word V; };

#ifdef __AVX512BF16__
constexpr bool MULTIPLIES_BFLOAT16 = true;
#else
constexpr bool MULTIPLIES_BFLOAT16 = false;
#endif
template <class S, class A>  // the word for numbers that are S in memory
using Operand = std::conditional_t<MULTIPLIES_BFLOAT16 && std::is_same_v<S, BFloat16>, Pair, A>;
template <class W> constexpr int DEPTH = std::is_same_v<W, Pair> ? 2 : 1;
template <class W> using Sum = std::conditional_t<std::is_same_v<W, Pair>, float, W>;  // the type of sums of products

template <class A> INLINE Vec<A> add_product(Vec<A> sum, A x, Vec<A> y) { return sum + x * y; }

// A vector of the words along one row. Where only 8 pairs are left, which is half a vector, the rest is zeros.
template <class W, class S> INLINE Vec<W> load_along(const S* row, int) { return load_as<W>(row); }
// A vector of the words across DEPTH rows. A next row that is null is zeros.
template <class W, class S> INLINE Vec<W> load_across(const S* row, const S*) { return load_as<W>(row); }
template <class A> INLINE void store_along(A* to, Vec<A> v) { store(to, v); }
template <class A> INLINE void store_across(A* to, const Vec<A> (&rows)[1]) { store(to, rows[0]); }

#ifdef __AVX512BF16__
INLINE Vec<float> add_product(Vec<float> sum, Pair x, Vec<Pair> y) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(x.bits + Vec<Pair>{}), (__m512bh)y);
}

template <> INLINE Vec<Pair> load_along<Pair>(const BFloat16* row, int words_left) {
  Vec<Pair> v{};
  if (words_left < LANES<Pair>) std::memcpy(&v, row, sizeof v / 2);
  else std::memcpy(&v, row, sizeof v);
  return v;
}
template <> INLINE Vec<Pair> load_across<Pair>(const BFloat16* row, const BFloat16* next) {
  const Vec<float> first = load_as<float>(row), second = next ? load_as<float>(next) : Vec<float>{};
  return ((Vec<Pair>)first >> 16) | (Vec<Pair>)second;
}

// These round, to nearest with ties to even; numbers too small for a normal bfloat16 become 0.
INLINE void store_along(Pair* to, Vec<float> v) {
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(to, &rounded, sizeof rounded);
}
INLINE void store_across(Pair* to, const Vec<float> (&rows)[2]) {
  typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES)));
  Halves in_turn;
  UNROLL for (int i = 0; i < 32; i++) in_turn[i] = uint16_t(i / 2 + i % 2 * 16);
  const auto rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);
  const __m512i pairs = _mm512_permutexvar_epi16((__m512i)in_turn, rounded);
  std::memcpy(to, &pairs, sizeof pairs);
}
#endif

}  // namespace minigpt2
