// What every C entry point shares. They are called by ../kernel.py alone, which checks what they are given, but for the
// last ones below.
//
// dtype: 0 float32, 1 bfloat16, 2 float64. Strides count elements, and the last one is 1. Each returns a status.

#pragma once

#include <cstdint>
#include <new>

#include "simd.h"

#define EXPORT extern "C" [[gnu::visibility("default")]]

namespace minigpt2 {

enum Status { DONE, NO_MEMORY, NO_SUCH_DTYPE };

// Calls f with the type in memory and the type of the arithmetic.
template <class F> Status dispatch(int dtype, const F& f) {
  try {
    switch (dtype) {
      case 0: f.template operator()<float, float>(); return DONE;
      case 1: f.template operator()<BFloat16, float>(); return DONE;
      case 2: f.template operator()<double, double>(); return DONE;
    }
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
  return NO_SUCH_DTYPE;
}

// What blocks.cpp calls as well.
EXPORT int minigpt2_few_rows(int dtype, int64_t M, int64_t K, int64_t N, const void* x, int64_t x_stride,
                             const void* weights, const void* bias, void* out);
EXPORT int minigpt2_gelu(int dtype, int64_t count, const void* x, const void* grad, void* out);
int decode_packed(int dtype, int64_t B, int64_t T, int64_t H, int64_t D, double scale, const void* qkv, void* k,
                  void* v, int64_t room, void* out);

}  // namespace minigpt2
