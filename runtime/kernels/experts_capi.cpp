// Stores of experts by handle, as plain C functions for Python; graphs name them so too.
#include <cerrno>
#include <cstring>
#include <shared_mutex>
#include <unordered_map>

#include "experts.h"

namespace shoal {
namespace {

std::shared_mutex registry;
int64_t next = 1;
std::unordered_map<int64_t, std::shared_ptr<Experts>>& stores() {
  static auto* found = new std::unordered_map<int64_t, std::shared_ptr<Experts>>;  // as in buffers.cpp
  return *found;
}

}  // namespace

std::shared_ptr<Experts> experts_of(int64_t handle) {
  std::shared_lock<std::shared_mutex> lock(registry);
  auto found = stores().find(handle);
  return found == stores().end() ? nullptr : found->second;
}

}  // namespace shoal

using namespace shoal;

// A store over an open file, which it opens once more for itself. `formats` has for each precision inputs, bits, group, span
// and rotated of gate and up, then the same of down, then whether they are gathered; `ats` where its first record is,
// `checksums` its CRC-32s. The handle, or below 0: a number of errno's.
extern "C" __attribute__((visibility("default"))) int64_t shoal_experts_open(
    int file, int layers, int experts, int precisions, const int64_t* ats, const int64_t* formats,
    const uint32_t* const* checksums, int slots, int policy, const double* parameters, int threads, int64_t rate, int direct,
    const float* predictor, int expand, float low, float skip) {
  const ExpertShape shape{layers, experts, slots};
  if (!shape.valid() || precisions < 1 || precisions > 2 || policy < 0 || policy >= kExpertPolicies || slots > layers * experts ||
      rate < 0 || static_cast<ExpertPolicy>(policy) == ExpertPolicy::belady)
    return -EINVAL;
  std::vector<ExpertRecords> records;
  for (int i = 0; i < precisions; ++i) {
    const int64_t* f = formats + 11 * i;
    const LinearFormat gate_up{f[0], 2 * f[5], static_cast<int>(f[1]), f[2], f[3], f[4] != 0};
    const LinearFormat down{f[5], f[0], static_cast<int>(f[6]), f[7], f[8], f[9] != 0};
    if (!gate_up.valid() || !down.valid() || down.inputs % kPanel || ats[i] < 0 || ats[i] % kExpertAlignment) return -EINVAL;
    if (f[10] && !gatherable(gate_up, down)) return -EINVAL;
    if (i && (down.inputs != records[0].down.inputs || down.outputs != records[0].down.outputs)) return -EINVAL;
    records.push_back({ats[i], gate_up, down, checksums[i], f[10] != 0});
  }
  int problem = ENOMEM;
  std::shared_ptr<Experts> made;
  try {
    made = Experts::open(file, {layers, experts, slots, threads, static_cast<ExpertPolicy>(policy), parameters, rate, direct,
                                predictor, expand, low, skip}, records, &problem);
  } catch (...) {
  }
  if (!made) return -problem;
  std::unique_lock<std::shared_mutex> lock(registry);
  stores()[next] = made;
  return next++;
}

// A run that uses the store meanwhile ends first, or keeps it.
extern "C" __attribute__((visibility("default"))) int shoal_experts_close(int64_t handle) {
  std::shared_ptr<Experts> last;
  std::unique_lock<std::shared_mutex> lock(registry);
  auto found = stores().find(handle);
  if (found == stores().end()) return 0;
  last = found->second;
  stores().erase(found);
  lock.unlock();
  return 1;
}

// Between two runs. 0: there is no such store, or a pass holds what would go.
extern "C" __attribute__((visibility("default"))) int shoal_experts_resize(int64_t handle, int slots) {
  auto store = experts_of(handle);
  if (!store) return 0;
  std::lock_guard<std::mutex> running(store->running);
  store->early.reset();
  return store->resize(slots);
}

extern "C" __attribute__((visibility("default"))) int shoal_experts_restart(int64_t handle) {
  auto store = experts_of(handle);
  if (store) store->restart();
  return store != nullptr;
}

// As ExpertCounters has them.
extern "C" __attribute__((visibility("default"))) int shoal_experts_counters(int64_t handle, int64_t* to) {
  auto store = experts_of(handle);
  if (!store) return 0;
  const ExpertCounters found = store->counters();
  static_assert(sizeof found == 14 * sizeof(int64_t));
  std::memcpy(to, &found, sizeof found);
  return 1;
}

// From the next run on the routing is kept, of at most `most` rows a layer; 0 ends it and drops what was kept.
extern "C" __attribute__((visibility("default"))) int shoal_experts_trace(int64_t handle, int64_t most, int scores, int inputs) {
  auto store = experts_of(handle);
  if (!store) return 0;
  std::lock_guard<std::mutex> running(store->running);
  const auto layers = static_cast<size_t>(store->options().layers);
  store->trace = {};
  if (most > 0) {
    store->trace.on = true;
    store->trace.most = most;
    store->trace.scores = scores != 0;
    store->trace.inputs = inputs != 0;
    store->trace.ids.resize(layers);
    store->trace.score.resize(layers);
    store->trace.input.resize(layers);
  }
  return 1;
}

// How many numbers were kept of a layer, and them if `to` is not null: kind 0 ids int16, 1 scores, 2 inputs, both float.
extern "C" __attribute__((visibility("default"))) int64_t shoal_experts_traced(int64_t handle, int layer, int kind, void* to) {
  auto store = experts_of(handle);
  if (!store) return -1;
  std::lock_guard<std::mutex> running(store->running);
  if (!store->trace.on || layer < 0 || layer >= store->options().layers || kind < 0 || kind > 2) return -1;
  const auto at = static_cast<size_t>(layer);
  if (kind == 0) {
    const auto& ids = store->trace.ids[at];
    if (to) std::memcpy(to, ids.data(), ids.size() * sizeof(int16_t));
    return static_cast<int64_t>(ids.size());
  }
  const auto& values = kind == 1 ? store->trace.score[at] : store->trace.input[at];
  if (to) std::memcpy(to, values.data(), values.size() * sizeof(float));
  return static_cast<int64_t>(values.size());
}
