// One attention call spread over threads. For many queries: every new key and value is stored, then blocks of rows
// attend, those with the most to read first. For few, as in decoding: each part of the keys, of a fixed size, is one
// item, whoever finishes the last part of a head merges them all, in order. So bits depend on nothing but the call.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "scratch.h"

namespace shoal {
namespace {

constexpr int64_t kStored = 32;    // positions of an item that stores
constexpr int64_t kQueries = 256;  // of an item that attends, over all heads that share its keys
constexpr int64_t kFastQueries = 384;  // where rounding the keys is work of its own
constexpr int64_t kPart = 32768;   // numbers of a part's keys: fewer and what a part costs by itself is felt

bool many(const AttentionPath& path, const AttentionShape& shape, const AttentionCall& call, const Parallel& parallel) {
  const int64_t pairs = call.batch * shape.kv_heads;
  auto over = [&](int64_t step, auto&& work) {
    const int64_t blocks = (call.length + step - 1) / step;
    parallel(pairs * blocks, [&, blocks, step](int64_t item) {
      const int64_t block = blocks - 1 - item / pairs, pair = item % pairs;
      work(pair / shape.kv_heads, pair % shape.kv_heads, block * step, std::min(call.length, (block + 1) * step));
    });
  };
  over(kStored, [&](int64_t sequence, int64_t head, int64_t from, int64_t to) {
    path.store(shape, call, sequence, head, from, to);
  });
  std::atomic<bool> enough{true};
  const int64_t group = shape.heads / shape.kv_heads;
  over(std::max<int64_t>(1, (shape.fast ? kFastQueries : kQueries) / group), [&](int64_t sequence, int64_t head, int64_t from, int64_t to) {
    Scratch scratch(scratch_bytes(shape));
    if (!scratch) return enough.store(false, std::memory_order_relaxed);
    path.attend(shape, call, sequence, head, from, to, scratch.take<uint8_t>(0));
  });
  return enough;
}

// What parts of the keys gave, `floats` floats each, as one output.
void merge(const AttentionShape& shape, const AttentionCall& call, int64_t sequence, int64_t kv_head,
           const AttentionPart* parts, int64_t count) {
  const int64_t n = shape.head_dim, group = shape.heads / shape.kv_heads;
  for (int64_t query = 0; query < call.length * group; ++query) {
    float peak = -INFINITY, total = 0;
    for (int64_t i = 0; i < count; ++i)
      if (parts[i].totals[query] != 0) peak = std::max(peak, parts[i].peaks[query]);
    float* out = call.out + ((sequence * call.length + query / group) * shape.heads + kv_head * group + query % group) * n;
    std::fill_n(out, n, 0.0f);
    auto share = [&](const AttentionPart& part) { return part.totals[query] * std::exp2(part.peaks[query] - peak); };
    for (int64_t i = 0; i < count; ++i)
      if (parts[i].totals[query] != 0) total += share(parts[i]);
    for (int64_t i = 0; i < count; ++i) {
      if (parts[i].totals[query] == 0) continue;
      const float weight = share(parts[i]) / total;
      const float* from = parts[i].out + query * n;
      for (int64_t d = 0; d < n; ++d) out[d] += weight * from[d];
    }
  }
}

bool few(const AttentionPath& path, const AttentionShape& shape, const AttentionCall& call, const Parallel& parallel) {
  const int64_t queries = call.length * (shape.heads / shape.kv_heads), pairs = call.batch * shape.kv_heads;
  const int64_t length = std::max<int64_t>(64, kPart / shape.head_dim / 64 * 64);  // of a part, in positions
  // Of the first new position, and so of all.
  auto first_part = [&](int64_t sequence) {
    const int64_t first = call.last[sequence] - call.length + 1;
    return shape.window ? std::max<int64_t>(0, first - shape.window + 1) / length : 0;
  };
  auto parts_of = [&](int64_t sequence) { return call.last[sequence] / length + 1 - first_part(sequence); };
  int64_t most = 1;
  for (int64_t b = 0; b < call.batch; ++b) most = std::max(most, parts_of(b));

  const int64_t floats = queries * (shape.head_dim + 2);
  const auto room = [](int64_t count, size_t size) { return Scratch::round_up(static_cast<size_t>(count) * size); };
  Scratch scratch(room(pairs * most * floats, sizeof(float)) + room(pairs * most, sizeof(AttentionPart)) +
                  room(pairs, sizeof(std::atomic<int64_t>)));
  if (!scratch) return false;
  float* results = scratch.take<float>(pairs * most * floats);
  auto* parts = scratch.take<AttentionPart>(pairs * most);
  auto* left = scratch.take<std::atomic<int64_t>>(pairs);
  for (int64_t pair = 0; pair < pairs; ++pair) new (left + pair) std::atomic<int64_t>(parts_of(pair / shape.kv_heads));

  std::atomic<bool> enough{true};
  in_runs(parallel, pairs * most, 1, [&](int64_t item, int64_t) {
    const int64_t pair = item / most, index = item % most, sequence = pair / shape.kv_heads, head = pair % shape.kv_heads;
    if (index >= parts_of(sequence)) return;
    Scratch own(scratch_bytes(shape));
    if (!own) return enough.store(false, std::memory_order_relaxed);
    const int64_t from = (first_part(sequence) + index) * length, to = from + length;
    // The new keys of a part are read by none but itself
    const int64_t first = call.last[sequence] - call.length + 1;
    const int64_t begin = std::max<int64_t>(0, from - first), end = std::min(call.length, to - first);
    if (begin < end) path.store(shape, call, sequence, head, begin, end);
    float* out = results + item * floats;
    parts[item] = {from, to, out, out + queries * shape.head_dim, out + queries * (shape.head_dim + 1)};
    path.attend_part(shape, call, sequence, head, parts[item], own.take<uint8_t>(0));
    if (left[pair].fetch_sub(1, std::memory_order_acq_rel) == 1)
      merge(shape, call, sequence, head, parts + pair * most, parts_of(sequence));
  });
  return enough;
}

}  // namespace

bool attention(const AttentionPath& path, const AttentionShape& shape, const AttentionCall& call,
               const Parallel& parallel) {
  if (!call.batch || !call.length) return true;
  return (call.length * (shape.heads / shape.kv_heads) <= kFewQueries ? few : many)(path, shape, call, parallel);
}

}  // namespace shoal
