#include "buffers.h"

#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace shoal {
namespace {

constexpr size_t kMost = 1 << 20;

std::shared_mutex mutex;
int64_t next = 1;  // handles are never used twice, so that a stale one is found out
std::unordered_map<int64_t, Buffer>& buffers() {
  static auto* found = new std::unordered_map<int64_t, Buffer>;  // never destroyed: a run may outlive main
  return *found;
}

}  // namespace

Buffer buffer_of(int64_t handle) {
  std::shared_lock<std::shared_mutex> lock(mutex);
  auto found = buffers().find(handle);
  return found == buffers().end() ? Buffer{nullptr, 0} : found->second;
}

}  // namespace shoal

using namespace shoal;

extern "C" __attribute__((visibility("default"))) int64_t shoal_buffer_register(const void* data, int64_t bytes) {
  std::unique_lock<std::shared_mutex> lock(mutex);
  if (buffers().size() >= kMost || !data || bytes < 0) return -1;
  buffers()[next] = {static_cast<const uint8_t*>(data), bytes};
  return next++;
}

extern "C" __attribute__((visibility("default"))) int shoal_buffer_set(int64_t handle, const void* data, int64_t bytes) {
  std::unique_lock<std::shared_mutex> lock(mutex);
  auto found = buffers().find(handle);
  if (found == buffers().end() || !data || bytes < 0) return 0;
  found->second = {static_cast<const uint8_t*>(data), bytes};
  return 1;
}

extern "C" __attribute__((visibility("default"))) int shoal_buffer_release(int64_t handle) {
  std::unique_lock<std::shared_mutex> lock(mutex);
  return static_cast<int>(buffers().erase(handle));
}
