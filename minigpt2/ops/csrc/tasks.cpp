// Tasks on PyTorch's own threads, through its C interface: its C++ headers would take half a minute to compile.

#include "tasks.h"

#include <algorithm>
#include <atomic>

#include <torch/csrc/stable/c/shim.h>

namespace minigpt2 {

int64_t thread_count() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return threads;
}

// No exception passes through PyTorch, whose C++ library need not be ours.
void run_tasks(int64_t tasks, void (*body)(const void*, int64_t), const void* context) {
  struct Shared {
    int64_t tasks;
    void (*body)(const void*, int64_t);
    const void* context;
    std::atomic<int64_t> next = 0;
    std::atomic<bool> no_memory = false;
  } shared{tasks, body, context};
  auto work = [](int64_t, int64_t, void* shared) {
    Shared& s = *static_cast<Shared*>(shared);
    try {
      for (int64_t task; (task = s.next.fetch_add(1)) < s.tasks;) s.body(s.context, task);
    } catch (const std::bad_alloc&) {
      s.no_memory = true;
    }
  };
  if (torch_parallel_for(0, std::min(thread_count(), tasks), 1, work, &shared) || shared.no_memory)
    throw std::bad_alloc();
}

}  // namespace minigpt2
