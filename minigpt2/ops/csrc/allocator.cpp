// A CPU allocator for PyTorch that keeps the memory of large tensors and packs it well.
//
// A training step allocates and frees gigabytes in nearly the order of a stack: the forward pass piles activations up,
// the backward pass takes them down. The C library either returns large blocks to the system, so that every use pays
// for the first touch of fresh pages, or keeps them in a heap that alignment and small neighbours break into holes.
// Here large blocks lie in one range of addresses of their own. A request takes the smallest hole that holds it (the
// lowest of equals), a freed block merges with the holes beside it, and nothing is given back: once touched, a page
// serves every later step.

#include "interface.h"

enum { IN_USE, REFUSED, ANOTHER_LIBRARY };  // what minigpt2_use_arena returns

#if defined(__linux__) && defined(_LIBCPP_VERSION)

// PyTorch is compiled with libstdc++ there, and a DataPtr made with libc++ would have another layout.
EXPORT int minigpt2_use_arena() { return ANOTHER_LIBRARY; }

#else

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t PAGE = 4096, LEAST = size_t{256} << 10;  // smaller requests are left to the C library

class Arena final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes < LEAST ? nullptr : take((bytes + PAGE - 1) / PAGE * PAGE);
    if (!data && bytes) data = c10::alloc_cpu(bytes);
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Reserves addresses, not memory: as many as all tensors of the machine could need. False if the system refuses.
  bool reserve() {
    std::lock_guard<std::mutex> lock(mutex);
    if (base) return true;
    size = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)) * 4 / PAGE * PAGE;
    void* range = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) return false;
#ifdef MADV_HUGEPAGE
    madvise(range, size, MADV_HUGEPAGE);  // pages of 2 MiB, not 4 KiB: 6% of the time of `minigpt2 bench step`
#endif
    // A child process has a copy of the arena, and must not find it locked by a thread that it does not have.
    pthread_atfork([] { arena().mutex.lock(); }, [] { arena().mutex.unlock(); }, [] { arena().mutex.unlock(); });
    base = static_cast<char*>(range);
    holes[base] = size;
    return true;
  }

  // Never destroyed: statics of other libraries may hold tensors, and free them after ours would be gone.
  static Arena& arena() {
    static Arena* const only = new Arena;
    return *only;
  }

 private:
  std::mutex mutex;
  char* base = nullptr;
  size_t size = 0;
  std::map<char*, size_t> holes;             // bytes by address
  std::unordered_map<char*, size_t> in_use;  // the same

  void* take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    auto best = holes.end();
    for (auto hole = holes.begin(); hole != holes.end(); ++hole)
      if (hole->second >= bytes && (best == holes.end() || hole->second < best->second)) best = hole;
    if (best == holes.end()) return nullptr;
    const auto [start, room] = *best;
    holes.erase(best);
    if (room > bytes) holes[start + bytes] = room - bytes;
    in_use[start] = bytes;
    return start;
  }

  void release(char* start) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto block = in_use.find(start);
    size_t bytes = block->second;
    in_use.erase(block);
    auto next = holes.lower_bound(start);
    if (next != holes.end() && start + bytes == next->first) {
      bytes += next->second;
      next = holes.erase(next);
    }
    if (next != holes.begin()) {
      if (auto before = std::prev(next); before->first + before->second == start) {
        before->second += bytes;
        return;
      }
    }
    holes[start] = bytes;
  }

  static void give_back(void* data) {
    Arena& self = arena();
    char* start = static_cast<char*>(data);
    if (start >= self.base && start < self.base + self.size)
      self.release(start);
    else
      c10::free_cpu(data);
  }
};

}  // namespace

// From now on new CPU tensors of at least LEAST bytes lie in the arena. Older ones are freed as they were made.
EXPORT int minigpt2_use_arena() {
  if (!Arena::arena().reserve()) return REFUSED;
  c10::SetCPUAllocator(&Arena::arena(), 1);
  return IN_USE;
}

#endif
