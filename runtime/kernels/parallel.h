// How an operator spreads its work: the caller says what one index does, somebody else's threads do it.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace shoal {

// Calls work(state, index) for every index in [0, count), on any thread, each once; returns when all are done.
struct Parallel {
  int threads;  // how many may run at once: scratch memory is one piece for each
  void* pool;
  void (*run)(void* pool, void (*work)(void* state, int64_t index), void* state, int64_t count);

  template <class Work>
  void operator()(int64_t count, Work&& work) const {
    auto call = [](void* state, int64_t index) { (*static_cast<std::remove_reference_t<Work>*>(state))(index); };
    if (count == 1) return work(0);
    run(pool, call, &work, count);
  }
};

// Calls work(first, last) for pieces of [0, count) of at most `step`, so that each thread reads one run from its front:
// a run that others cut into is fetched from memory twice, since what prefetches for a core reads on past its piece. Who
// is done takes pieces from the back of another's run, so a thread that starts late, or is held up, costs its share only.
template <class Work>
void in_runs(const Parallel& parallel, int64_t count, int64_t step, Work&& work) {
  constexpr int64_t kMost = 64;
  struct alignas(64) Run {
    std::atomic<uint64_t> left;  // front | back << 32
  } runs[kMost];
  const int64_t threads = std::max<int64_t>(1, std::min({int64_t{parallel.threads}, kMost, (count + step - 1) / step}));
  for (int64_t i = 0; i < threads; ++i) {
    const auto front = static_cast<uint64_t>(count * i / threads), back = static_cast<uint64_t>(count * (i + 1) / threads);
    runs[i].left.store(front | back << 32, std::memory_order_relaxed);
  }
  parallel(threads, [&](int64_t own) {
    for (int64_t i = 0; i < threads; ++i) {
      std::atomic<uint64_t>& left = runs[(own + i) % threads].left;
      for (uint64_t seen = left.load(std::memory_order_relaxed);;) {
        const auto front = static_cast<int64_t>(seen & 0xffffffff), back = static_cast<int64_t>(seen >> 32);
        if (front >= back) break;
        const int64_t size = std::min(step, back - front);
        const uint64_t rest = i ? static_cast<uint64_t>(front) | static_cast<uint64_t>(back - size) << 32
                                : static_cast<uint64_t>(front + size) | static_cast<uint64_t>(back) << 32;
        if (!left.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) continue;
        seen = rest;
        const int64_t first = i ? back - size : front;
        work(first, first + size);
      }
    }
  });
}

}  // namespace shoal
