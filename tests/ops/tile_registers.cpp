// What products by tiles cost as the number of registers in use grows: the figures of minigpt2/ops/csrc/tiles.h.
//     g++ -std=c++20 -O2 -march=native -pthread tests/ops/tile_registers.cpp -o /tmp/tile_registers && /tmp/tile_registers
// Two threads multiply at a time, each a panel of b in L1 by what it reads of a in L2; the kinds take turns. Prints
// billions of operations a second and thread, of each kind the quantiles of many short runs.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

constexpr int TILE = 1024, DEEP = 12, PANELS = 16, RUNS = 60;

#define LOAD(tile, p) _tile_loadd(tile, p, 64)
#define PRODUCT(c, a, b) _tile_dpbf16ps(c, a, b)

struct Kind { const char* name; int products; void (*step)(const char* a, const char* b); };
const Kind KINDS[] = {
    {"2 x 2 sums, 8 registers", 4,
     [](const char* a, const char* b) {
       LOAD(4, a); LOAD(6, b); LOAD(7, b + TILE); PRODUCT(0, 4, 6); PRODUCT(1, 4, 7);
       LOAD(5, a + TILE); PRODUCT(2, 5, 6); PRODUCT(3, 5, 7);
     }},
    {"2 x 2 sums, 7 registers", 4,
     [](const char* a, const char* b) {
       LOAD(4, a); LOAD(5, b); LOAD(6, b + TILE); PRODUCT(0, 4, 5); PRODUCT(1, 4, 6);
       LOAD(4, a + TILE); PRODUCT(2, 4, 5); PRODUCT(3, 4, 6);
     }},
    {"1 x 4 sums, 6 registers", 4,
     [](const char* a, const char* b) {
       LOAD(4, a); LOAD(5, b); PRODUCT(0, 4, 5); LOAD(5, b + TILE); PRODUCT(1, 4, 5);
       LOAD(5, b + 2 * TILE); PRODUCT(2, 4, 5); LOAD(5, b + 3 * TILE); PRODUCT(3, 4, 5);
     }},
    {"1 x 3 sums, 5 registers", 3,
     [](const char* a, const char* b) {
       LOAD(3, a); LOAD(4, b); PRODUCT(0, 3, 4); LOAD(4, b + TILE); PRODUCT(1, 3, 4);
       LOAD(4, b + 2 * TILE); PRODUCT(2, 3, 4);
     }},
    {"1 x 2 sums, 4 registers", 2,
     [](const char* a, const char* b) {
       LOAD(2, a); LOAD(3, b); PRODUCT(0, 2, 3); LOAD(3, b + TILE); PRODUCT(1, 2, 3);
     }},
};

double rate(const Kind& kind, const char* memory) {
  struct alignas(64) {
    unsigned char palette = 1, rest[15] = {};
    unsigned short bytes[16] = {};
    unsigned char rows[16] = {};
  } shape;
  for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = 64, shape.rows[tile] = 16;
  _tile_loadconfig(&shape);
  const auto start = std::chrono::steady_clock::now();
  double seconds = 0;
  long products = 0;
  while (seconds < 0.02) {
    for (int panel = 0; panel < PANELS; panel++)
      for (int k = 0; k < DEEP; k++)
        kind.step(memory + (1 << 16) + (panel * DEEP + k) * 2 * TILE, memory + k * 2 * TILE);
    products += long(kind.products) * PANELS * DEEP;
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  _tile_release();
  return 2.0 * 16 * 16 * 32 * products / seconds * 1e-9;
}

int main() {
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return std::puts("this process may not use tiles"), 1;
  std::vector<char*> memory;
  for (int i = 0; i < 2; i++) {
    memory.push_back(static_cast<char*>(std::aligned_alloc(1 << 21, 1 << 21)));
    std::memset(memory.back(), 0, 1 << 21);
  }
  std::vector<double> found[std::size(KINDS)];
  for (int run = 0; run < RUNS; run++)
    for (size_t i = 0; i < std::size(KINDS); i++) {
      double both[2];
      std::thread other([&] { both[1] = rate(KINDS[i], memory[1]); });
      both[0] = rate(KINDS[i], memory[0]);
      other.join();
      found[i].insert(found[i].end(), both, both + 2);
    }
  std::printf("%-26s%8s%8s%8s\n", "", "25%", "50%", "75%");
  for (size_t i = 0; i < std::size(KINDS); i++) {
    std::sort(found[i].begin(), found[i].end());
    std::printf("%-26s", KINDS[i].name);
    for (int quarter = 1; quarter < 4; quarter++) std::printf("%8.0f", found[i][quarter * found[i].size() / 4]);
    std::puts("");
  }
}
