#include "scratch.h"

#include <cstdlib>
#include <mutex>

namespace shoal {
namespace {

constexpr size_t kKept = 16;  // pieces that wait for the next call; more than threads that call at once is of no use

struct Piece {
  uint8_t* data;
  size_t size;
};

std::mutex mutex;
Piece kept[kKept];
size_t count;

}  // namespace

Scratch::Scratch(size_t bytes) {
  bytes = round_up(bytes ? bytes : 1);
  {
    std::lock_guard<std::mutex> lock(mutex);
    size_t best = kKept;
    for (size_t i = 0; i < count; ++i)
      if (kept[i].size >= bytes && (best == kKept || kept[i].size < kept[best].size)) best = i;
    if (best != kKept) {
      data_ = kept[best].data;
      size_ = kept[best].size;
      kept[best] = kept[--count];
      return;
    }
    if (count) {  // none is large enough: the largest makes place for what is asked for
      size_t largest = 0;
      for (size_t i = 1; i < count; ++i)
        if (kept[i].size > kept[largest].size) largest = i;
      std::free(kept[largest].data);
      kept[largest] = kept[--count];
    }
  }
  data_ = static_cast<uint8_t*>(std::aligned_alloc(64, bytes));
  size_ = bytes;
}

Scratch::~Scratch() {
  if (!data_) return;
  std::lock_guard<std::mutex> lock(mutex);
  if (count < kKept) {
    kept[count++] = {data_, size_};
  } else {
    std::free(data_);
  }
}

}  // namespace shoal
