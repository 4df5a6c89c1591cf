// Threads made for one call, for what is called without an engine.
#pragma once
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "parallel.h"

namespace shoal {

struct Threads {
  int count;

  Parallel parallel() { return {count, this, run}; }

  static void run(void* pool, void (*work)(void*, int64_t), void* state, int64_t count) {
    std::atomic<int64_t> next{0};
    auto share = [&] {
      for (int64_t i; (i = next++) < count;) work(state, i);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min<int64_t>(static_cast<Threads*>(pool)->count, count); ++i) others.emplace_back(share);
    share();
    for (auto& other : others) other.join();
  }
};

}  // namespace shoal
