// One more token through the blocks of the transformer, as in generation, in one call.
//
// The operations are those of ../../model.py, one after the other, and round where those round. What they cost when
// they are called from Python one by one stands in ../blocks.py.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "interface.h"
#include "simd.h"
#include "tasks.h"

using namespace minigpt2;

namespace {

struct Weights {
  const void *weight, *bias;
};
struct Places {  // of the tensors of a block
  Weights ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj;
  void *k, *v;
};
struct Numbers {
  double scale, eps_1, eps_2;
};

thread_local Scratch rows;  // the products' is another

// out = (x - mean) / sqrt(variance + eps) * weight + bias, for one row; C is a multiple of a vector.
template <class S, class A> void layer_norm(int64_t C, const S* x, const Weights& w, A eps, S* out) {
  constexpr int n = LANES<A>;
  const auto weight = static_cast<const S*>(w.weight), bias = static_cast<const S*>(w.bias);
  Vec<A> sum{}, squares{};
  for (int64_t i = 0; i < C; i += n) sum += load_as<A>(x + i);
  const Vec<A> mean = splat(sum_lanes<A>(sum) / A(C));
  for (int64_t i = 0; i < C; i += n) {
    const Vec<A> off = load_as<A>(x + i) - mean;
    squares += off * off;
  }
  const A inverse = 1 / std::sqrt(sum_lanes<A>(squares) / A(C) + eps);
  for (int64_t i = 0; i < C; i += n)
    store_as<A>(out + i, (load_as<A>(x + i) - mean) * inverse * load_as<A>(weight + i) + load_as<A>(bias + i));
}

void finish(int status) {
  if (status) throw std::bad_alloc();
}

}  // namespace

// x and out (B, C) with C = H D, the weights of products (in, out), the caches (B, H, room, D): contiguous. Keys and
// values become the T-th of the caches. C and inner are multiples of 32, D of 16; B is from 1 to FEW.
EXPORT int minigpt2_decode_blocks(int dtype, int64_t B, int64_t T, int64_t H, int64_t D, int64_t inner, int64_t room,
                                  int64_t blocks, const void* places, const void* numbers, const void* x, void* out) {
  return dispatch(dtype, [&]<class S, class A>() {
    const int64_t C = H * D;
    rows.reserve(sizeof(S) * B * (6 * C + inner) + 5 * 64);
    S *normed = rows.take<S>(B * C), *qkv = rows.take<S>(B * 3 * C), *attended = rows.take<S>(B * C),
      *change = rows.take<S>(B * C), *hidden = rows.take<S>(B * inner), *stream = static_cast<S*>(out);
    auto normalise = [&](const Weights& w, double eps) {
      for (int64_t b = 0; b < B; b++) layer_norm<S, A>(C, stream + b * C, w, A(eps), normed + b * C);
    };
    auto project = [&](const S* from, int64_t K, const Weights& w, int64_t N, S* to) {
      finish(minigpt2_few_rows(dtype, B, K, N, from, K, w.weight, w.bias, to));
    };
    auto add_change = [&] {
      for (int64_t i = 0; i < B * C; i += LANES<A>)
        store_as<A>(stream + i, load_as<A>(stream + i) + load_as<A>(change + i));
    };
    std::memcpy(out, x, B * C * sizeof(S));
    for (int64_t i = 0; i < blocks; i++) {
      const Places& at = static_cast<const Places*>(places)[i];
      const Numbers& with = static_cast<const Numbers*>(numbers)[i];
      normalise(at.ln_1, with.eps_1);
      project(normed, C, at.c_attn, 3 * C, qkv);
      finish(decode_packed(dtype, B, T, H, D, with.scale, qkv, at.k, at.v, room, attended));
      project(attended, C, at.attn_c_proj, C, change);
      add_change();
      normalise(at.ln_2, with.eps_2);
      project(normed, C, at.c_fc, inner, hidden);
      finish(minigpt2_gelu(dtype, B * inner, hidden, nullptr, hidden));
      project(hidden, inner, at.mlp_c_proj, C, change);
      add_change();
    }
  });
}
