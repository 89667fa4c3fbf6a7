// Work cut into tasks for PyTorch's own threads, and the memory that each thread works in.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace minigpt2 {

// A thread's buffers, kept from call to call: the pages of a fresh allocation cost more than a short attention.
struct Scratch {
  char* memory = nullptr;
  size_t capacity = 0, used = 0;

  ~Scratch() { std::free(memory); }
  void reserve(size_t bytes) {
    used = 0;
    if (bytes <= capacity) return;
    std::free(memory);
    capacity = 0;
    memory = static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
    if (!memory) throw std::bad_alloc();
    capacity = bytes;
  }
  template <class X> X* take(size_t count) {
    X* p = reinterpret_cast<X*>(memory + used);
    used += (count * sizeof(X) + 63) / 64 * 64;
    return p;
  }
};
inline thread_local Scratch scratch;

int64_t thread_count();

void run_tasks(int64_t tasks, void (*body)(const void* context, int64_t task), const void* context);

// Calls body(task) once for each of 0 ... tasks - 1. A thread takes the next task when it is free, because tasks under
// a causal mask differ in length.
template <class F> void for_each_task(int64_t tasks, const F& body) {
  run_tasks(tasks, [](const void* context, int64_t task) { (*static_cast<const F*>(context))(task); }, &body);
}

}  // namespace minigpt2
