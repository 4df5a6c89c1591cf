#include "buffers.h"

#include <algorithm>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

namespace shoal {
namespace {

constexpr size_t kMost = 1 << 20;
constexpr int64_t kMostMatrices = 1 << 14;

std::shared_mutex mutex;
int64_t next = 1;  // handles are never used twice, so that a stale one is found out
std::unordered_map<int64_t, Buffer>& buffers() {
  static auto* found = new std::unordered_map<int64_t, Buffer>;  // never destroyed: a run may outlive main
  return *found;
}

// A matrix, as `set` was given it.
struct Blocks {
  std::vector<const uint8_t*> payloads;
  std::vector<int64_t> bytes;
  Buffer base;
  int bits;
  int64_t group, span;
};
std::unordered_map<int64_t, std::vector<Blocks>>& stacks() {
  static auto* found = new std::unordered_map<int64_t, std::vector<Blocks>>;
  return *found;
}

}  // namespace

Buffer buffer_of(int64_t handle) {
  std::shared_lock<std::shared_mutex> lock(mutex);
  auto found = buffers().find(handle);
  return found == buffers().end() ? Buffer{nullptr, 0} : found->second;
}

bool stack_of(int64_t handle, int64_t matrix, Payloads* to) {
  std::shared_lock<std::shared_mutex> lock(mutex);
  auto found = stacks().find(handle);
  if (found == stacks().end() || matrix < 0 || matrix >= static_cast<int64_t>(found->second.size())) return false;
  const Blocks& blocks = found->second[static_cast<size_t>(matrix)];
  std::copy(blocks.payloads.begin(), blocks.payloads.end(), to->blocks);
  std::copy(blocks.bytes.begin(), blocks.bytes.end(), to->bytes);
  to->count = static_cast<int>(blocks.payloads.size());
  to->base = blocks.base;
  to->bits = blocks.bits;
  to->group = blocks.group;
  to->span = blocks.span;
  return true;
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

extern "C" __attribute__((visibility("default"))) int64_t shoal_stack_register(int64_t matrices) {
  std::unique_lock<std::shared_mutex> lock(mutex);
  if (stacks().size() >= kMost || matrices < 1 || matrices > kMostMatrices) return -1;
  stacks()[next].resize(static_cast<size_t>(matrices));
  return next++;
}

extern "C" __attribute__((visibility("default"))) int shoal_stack_set(int64_t handle, int64_t matrix,
                                                                      const void* const* payloads, const int64_t* bytes,
                                                                      int count, const void* base, int64_t base_bytes,
                                                                      int bits, int64_t group, int64_t span) {
  if (count < 0 || count > kStackLevels || base_bytes < 0) return 0;
  Blocks fresh{{}, {bytes, bytes + count}, {static_cast<const uint8_t*>(base), base_bytes}, bits, group, span};
  for (int i = 0; i < count; ++i) {
    if (!payloads[i] || bytes[i] < 0) return 0;
    fresh.payloads.push_back(static_cast<const uint8_t*>(payloads[i]));
  }
  std::unique_lock<std::shared_mutex> lock(mutex);
  auto found = stacks().find(handle);
  if (found == stacks().end() || matrix < 0 || matrix >= static_cast<int64_t>(found->second.size())) return 0;
  std::swap(found->second[static_cast<size_t>(matrix)], fresh);
  return 1;
}

extern "C" __attribute__((visibility("default"))) int shoal_stack_release(int64_t handle) {
  std::unique_lock<std::shared_mutex> lock(mutex);
  return static_cast<int>(stacks().erase(handle));
}
