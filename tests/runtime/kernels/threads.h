// A pool for the checks: the threads of one operator are started for it.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "parallel.h"

inline void run_threads(void* pool, void (*work)(void*, int64_t), void* state, int64_t count) {
  std::atomic<int64_t> next{0};
  auto loop = [&] {
    for (int64_t i; (i = next++) < count;) work(state, i);
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < *static_cast<int*>(pool); ++i) threads.emplace_back(loop);
  loop();
  for (auto& thread : threads) thread.join();
}

// While `threads` lives.
inline shoal::Parallel on(int& threads) { return {threads, &threads, run_threads}; }
