#include "expert_cache.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <new>

namespace shoal {
namespace {

constexpr double kDefaults[kExpertPolicies][kExpertParameters] = {
    {}, {}, {0.25, 0.25, 0.25, 0.25, 0}, {0.25, 0}, {0.5, 0}, {4}, {}};
constexpr double kAlmostNow = 0.1;  // so that 1/D has an end

}  // namespace

bool ExpertShape::valid() const {
  return layers >= 1 && layers <= 1024 && experts >= 1 && experts <= 1024 && slots >= 1;
}

ExpertCache::ExpertCache(ExpertShape shape, ExpertPolicy policy, const double* parameters)
    : shape_{shape.layers, shape.experts, 0},
      policy_(policy),
      of_(static_cast<size_t>(shape.layers) * shape.experts),
      tokens_(static_cast<size_t>(shape.layers)) {
  const double* from = parameters ? parameters : kDefaults[static_cast<int>(policy)];
  std::copy(from, from + kExpertParameters, parameters_);
  resize(shape.slots, nullptr);
}

void ExpertCache::restart() {
  std::fill(tokens_.begin(), tokens_.end(), 0);
  for (Expert& one : of_) {
    one.uses = one.high = 0;
    one.token = 0;
  }
}

void ExpertCache::routed(int layer, const int32_t* ids, int count, const float* scores) {
  Expert* of = &of_[id(layer, 0)];
  layer_ = layer;
  ++tokens_[layer];
  for (int i = 0; i < shape_.experts; ++i)
    if (of[i].slot >= 0) slots_[of[i].slot].expected = false;
  for (int i = count - 1; i >= 0; --i) {  // the first counts as the last one used
    if (ids[i] < 0) continue;
    Expert& one = of[ids[i]];
    one.used = ++clock_;
    one.token = tokens_[layer];
    ++one.uses;
    ++one.high;
    if (one.slot >= 0 && slots_[one.slot].guessed) {
      slots_[one.slot].guessed = false;
      ++useful_;
    }
  }
  if (policy_ != ExpertPolicy::mrs) return;
  const double alpha = parameters_[0];
  for (int i = 0; i < shape_.experts; ++i) of[i].score *= 1 - alpha;
  if (!scores) {  // whoever is chosen has an equal share
    for (int i = 0; i < count; ++i)
      if (ids[i] >= 0) of[ids[i]].score += alpha / count;
    return;
  }
  const int most = parameters_[1] >= 1 ? static_cast<int>(std::min(parameters_[1], 1024.0)) : 2 * count;
  sorted_.assign(scores, scores + shape_.experts);
  for (float& score : sorted_)
    if (!std::isfinite(score)) score = 0;
  float least = -INFINITY;
  if (most < shape_.experts) {
    std::nth_element(sorted_.begin(), sorted_.begin() + most, sorted_.end(), std::greater<float>());
    least = sorted_[static_cast<size_t>(most)];  // the largest of those that count as 0
  }
  for (int i = 0; i < shape_.experts; ++i)
    if (std::isfinite(scores[i]) && scores[i] > least) of[i].score += alpha * scores[i];
}

void ExpertCache::expect(int layer, int expert) {
  const int slot = find(layer, expert);
  if (slot >= 0) slots_[slot].expected = true;
}

double ExpertCache::worth(int64_t owner) const {
  const Expert& one = of_[static_cast<size_t>(owner)];
  const double* p = parameters_;
  switch (policy_) {
    case ExpertPolicy::lru:
    case ExpertPolicy::shallow:
      return static_cast<double>(one.used);
    case ExpertPolicy::lfu:
      return one.uses;
    case ExpertPolicy::mrs:
      return one.score;
    case ExpertPolicy::belady:
      return -static_cast<double>(one.next);
    case ExpertPolicy::hobbit:
    case ExpertPolicy::apex:
      break;
  }
  const bool hobbit = policy_ == ExpertPolicy::hobbit;
  const int layer = static_cast<int>(owner / shape_.experts), as_published = p[hobbit ? 4 : 1] != 0;
  const double away = (layer - layer_ - 1 + as_published + 2 * shape_.layers) % shape_.layers;
  const double tokens = static_cast<double>(std::max<int64_t>(tokens_[layer_], 1));
  if (hobbit)
    return (p[0] * static_cast<double>(one.token) + p[1] * one.uses + p[2] * one.high) / tokens +
           p[3] * (1 - away / shape_.layers);
  const double cost = (one.high + p[0] * (one.uses - one.high)) / tokens;
  return cost + (one.token && one.token == tokens_[layer] ? 1 / (away + kAlmostNow) : 0);
}

void ExpertCache::leave(int slot) {
  Slot& left = slots_[slot];
  if (left.guessed) ++wasted_;
  if (left.owner >= 0) of_[static_cast<size_t>(left.owner)].slot = -1;
  left.owner = -1;
  left.guessed = left.expected = false;
}

int ExpertCache::take(int layer, int expert, bool demanded, int64_t* evicted) {
  const int64_t wanted = static_cast<int64_t>(id(layer, expert));
  *evicted = -1;
  int found = of_[static_cast<size_t>(wanted)].slot;
  if (found >= 0) return found;
  if (!free_.empty()) {
    found = free_.back();
    free_.pop_back();
  } else {
    int lowest_rank = 0;
    double lowest = 0;
    int64_t oldest = 0;
    for (int slot = 0; slot < shape_.slots; ++slot) {
      const Slot& one = slots_[slot];
      if (one.pins || one.owner < 0) continue;
      const int rank = stays(one.owner) ? 2 : one.expected;
      if (rank && !demanded) continue;
      if (found >= 0 && rank > lowest_rank) continue;
      const double worth = this->worth(one.owner);
      const int64_t used = of_[static_cast<size_t>(one.owner)].used;
      if (found >= 0 && rank == lowest_rank && (worth > lowest || (worth == lowest && used >= oldest))) continue;
      found = slot;
      lowest_rank = rank;
      lowest = worth;
      oldest = used;
    }
    if (found < 0) return -1;
    // Who knows the future does not give up who is needed before the one that is guessed
    if (!demanded && policy_ == ExpertPolicy::belady && worth(wanted) <= lowest) return -1;
    *evicted = slots_[found].owner;
    leave(found);
  }
  slots_[found].owner = wanted;
  slots_[found].guessed = slots_[found].expected = !demanded;
  of_[static_cast<size_t>(wanted)].slot = found;
  return found;
}

void ExpertCache::unpin(int slot) {
  if (--slots_[slot].pins == 0 && slots_[slot].owner < 0) free_.push_back(slot);
}

void ExpertCache::forget(int slot) {
  if (slots_[slot].owner < 0) return;
  leave(slot);
  if (!slots_[slot].pins) free_.push_back(slot);
}

bool ExpertCache::resize(int slots, std::vector<std::pair<int64_t, int>>* evicted) {
  if (slots < 1) return false;
  for (int slot = slots; slot < shape_.slots; ++slot)
    if (slots_[slot].pins) return false;
  for (int slot = slots; slot < shape_.slots; ++slot) {
    if (slots_[slot].owner < 0) continue;
    if (evicted) evicted->emplace_back(slots_[slot].owner, slot);
    leave(slot);
  }
  free_.erase(std::remove_if(free_.begin(), free_.end(), [&](int slot) { return slot >= slots; }), free_.end());
  std::vector<int> fresh;
  for (int slot = slots - 1; slot >= shape_.slots; --slot) fresh.push_back(slot);
  free_.insert(free_.begin(), fresh.begin(), fresh.end());
  slots_.resize(static_cast<size_t>(slots));
  shape_.slots = slots;
  const int most = slots / 2 / shape_.experts;
  const double asked = policy_ == ExpertPolicy::shallow ? std::max(parameters_[0], 0.0) : 0;
  kept_ = static_cast<int64_t>(std::min<double>(asked, most)) * shape_.experts;
  return true;
}

}  // namespace shoal

namespace {

using namespace shoal;

// What happened, in this order; runtime/experts/policies.py has the same.
enum Count { kHits, kMisses, kCompulsory, kReads, kUseful, kLate, kWasted, kCold, kForetold, kCounts };

struct Trace {
  int layers, experts, top_k, width;
  int64_t tokens;
  const int32_t* ids;        // [tokens][layers][top_k]; negative: nobody
  const float* scores;       // [tokens][layers][experts] or null
  const int32_t* predicted;  // [tokens][layers][width] or null

  const int32_t* chosen(int64_t step) const { return ids + step * top_k; }
  bool valid() const {
    auto within = [&](const int32_t* from, int64_t count) {
      return std::all_of(from, from + count, [&](int32_t id) { return id < experts; });
    };
    return within(ids, tokens * layers * top_k) && (!predicted || within(predicted, tokens * layers * width));
  }
};

// When each use is followed by the next one of the same expert, in steps; `first` is for each expert its first use.
std::vector<int64_t> next_uses(const Trace& trace, std::vector<int64_t>* first) {
  std::vector<int64_t> next(static_cast<size_t>(trace.tokens * trace.layers * trace.top_k));
  first->assign(static_cast<size_t>(trace.layers) * trace.experts, INT64_MAX);
  for (int64_t step = trace.tokens * trace.layers - 1; step >= 0; --step)
    for (int i = 0; i < trace.top_k; ++i) {
      const int32_t expert = trace.chosen(step)[i];
      if (expert < 0) continue;
      int64_t& seen = (*first)[static_cast<size_t>(step % trace.layers) * trace.experts + expert];
      next[static_cast<size_t>(step * trace.top_k + i)] = seen;
      seen = step;
    }
  return next;
}

void simulate(const Trace& trace, ExpertCache& cache, bool foresight, double per_layer_reads, const int64_t* starts,
              int64_t sequences, int64_t* counters) {
  std::vector<int64_t> first, next;
  if (foresight) {
    next = next_uses(trace, &first);
    for (size_t i = 0; i < first.size(); ++i)
      cache.next_use(static_cast<int>(i) / trace.experts, static_cast<int>(i) % trace.experts, first[i]);
  }
  std::vector<char> seen(static_cast<size_t>(trace.layers) * trace.experts);
  std::vector<int> held;
  auto release = [&] {
    for (int slot : held) cache.unpin(slot);
    held.clear();
  };
  int64_t sequence = -1, useful = 0, wasted = 0, evicted;
  double time = 0;  // to read, in records; what is left of one that has begun is kept
  int64_t* count = counters;
  auto settle = [&] {
    count[kUseful] += cache.useful() - useful;
    count[kWasted] += cache.wasted() - wasted;
    useful = cache.useful();
    wasted = cache.wasted();
  };
  for (int64_t step = 0; step < trace.tokens * trace.layers; ++step) {
    const int layer = static_cast<int>(step % trace.layers);
    const int32_t* ids = trace.chosen(step);
    if (!layer && sequence + 1 < sequences && starts[sequence + 1] == step / trace.layers) {
      settle();
      release();
      cache.restart();
      ++sequence;
      count = counters + sequence * kCounts;
    }
    auto among = [&](const int32_t* guesses, int32_t expert) {
      return std::find(guesses, guesses + trace.width, expert) != guesses + trace.width;
    };
    const int32_t* guesses = trace.predicted ? trace.predicted + step * trace.width : nullptr;
    for (int i = 0; i < trace.top_k; ++i) {
      if (ids[i] < 0 || cache.find(layer, ids[i]) >= 0) continue;
      ++count[kCold];
      if (guesses && among(guesses, ids[i])) ++count[kForetold];
    }
    // While the layer before computes
    time = std::fmod(time, 1) + per_layer_reads;
    if (guesses) {
      for (int i = 0; i < trace.width; ++i)
        if (guesses[i] >= 0) cache.expect(layer, guesses[i]);
      for (int i = 0; i < trace.width; ++i) {
        if (guesses[i] < 0 || cache.find(layer, guesses[i]) >= 0) continue;
        if (per_layer_reads >= 0 && time < 1) {
          count[kLate] += std::find(ids, ids + trace.top_k, guesses[i]) != ids + trace.top_k;
        } else if (cache.take(layer, guesses[i], false, &evicted) >= 0) {
          --time;
          ++count[kReads];
        }
      }
    }
    release();
    // The layer itself
    cache.routed(layer, ids, trace.top_k, trace.scores ? trace.scores + step * trace.experts : nullptr);
    for (int i = 0; i < trace.top_k; ++i) {
      if (ids[i] < 0) continue;
      if (foresight) cache.next_use(layer, ids[i], next[static_cast<size_t>(step * trace.top_k + i)]);
      const int slot = cache.find(layer, ids[i]);
      if (slot < 0) continue;
      ++count[kHits];
      seen[static_cast<size_t>(layer) * trace.experts + ids[i]] = 1;
      cache.pin(slot);
      held.push_back(slot);
    }
    for (int i = 0; i < trace.top_k; ++i) {
      if (ids[i] < 0 || cache.find(layer, ids[i]) >= 0) continue;
      char& before = seen[static_cast<size_t>(layer) * trace.experts + ids[i]];
      ++count[kMisses];
      count[kCompulsory] += !before;
      before = 1;
      const int slot = cache.take(layer, ids[i], true, &evicted);
      if (slot < 0) continue;  // fewer slots than experts of a token: read into some other place
      cache.pin(slot);
      held.push_back(slot);
    }
  }
  release();
  settle();
  for (int slot = 0; slot < cache.slots(); ++slot) count[kWasted] += cache.unused(slot);
}

}  // namespace

// Runs a policy over a recorded trace and guesses. `starts` [sequences]: the first token of each, ascending from 0;
// `predicted`: guesses of a layer's experts, the best first, that are there while the layer before it runs, and of
// which that gives time to read `per_layer_reads` on average (below 0: all); the others are never begun. `parameters`:
// kExpertParameters or null. Adds to counters [sequences][9] the uses of experts that were there and that were not, the
// first uses of all among the latter, reads of guesses, those that were used, guesses that were right but had no time,
// reads that were for nothing, and, before the guesses about each layer: needed experts that were not there, and those
// of them that were guessed.
extern "C" __attribute__((visibility("default"))) int shoal_experts_simulate(
    int layers, int experts, int64_t tokens, int top_k, const int32_t* ids, const float* scores,
    const int32_t* predicted, int width, double per_layer_reads, const int64_t* starts, int64_t sequences, int slots,
    int policy, const double* parameters, int64_t* counters) {
  if (!ExpertShape{layers, experts, slots}.valid() || tokens < 0 || tokens > INT64_MAX / (1 << 24)) return 1;
  if (policy < 0 || policy >= kExpertPolicies || !std::isfinite(per_layer_reads)) return 1;
  if (top_k < 1 || top_k > experts || width < 0 || width > experts || sequences < 1 || starts[0] != 0) return 1;
  for (int64_t i = 1; i < sequences; ++i)
    if (starts[i] <= starts[i - 1] || starts[i] >= tokens) return 1;
  const Trace trace{layers, experts, top_k, width, tokens, ids, scores, width ? predicted : nullptr};
  if (!trace.valid()) return 4;
  try {
    const auto chosen = static_cast<ExpertPolicy>(policy);
    ExpertCache cache({layers, experts, std::min(slots, layers * experts)}, chosen, parameters);
    const bool foresight = chosen == ExpertPolicy::belady;
    simulate(trace, cache, foresight, per_layer_reads, starts, sequences, counters);
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}

// Of one layer: where each use finds its expert in a stack of priorities (Mattson et al. 1970), from 1; a cache of so
// many slots has it. The priority is how often the next `window` tokens use it, then who was used last; all of a
// token's experts are looked up before any of them moves to the top. A first use is `experts` + the number of experts
// seen before it + 1. `ids` and `depths` [tokens][top_k]; a negative id is nobody, at depth 0.
extern "C" __attribute__((visibility("default"))) int shoal_experts_depths(int experts, int64_t tokens, int top_k,
                                                                           const int32_t* ids, int64_t window,
                                                                           int32_t* depths) {
  const Trace trace{1, experts, top_k, 0, tokens, ids, nullptr, nullptr};
  if (experts < 1 || experts > 1024 || tokens < 0 || top_k < 1 || top_k > experts || window < 1) return 1;
  if (!trace.valid()) return 4;
  window = std::min(window, tokens + 1);
  std::vector<int64_t> ahead(static_cast<size_t>(experts)), used(static_cast<size_t>(experts));
  std::vector<int32_t> stack;
  auto count = [&](int64_t token, int64_t by) {
    if (token >= tokens) return;
    for (int i = 0; i < top_k; ++i)
      if (trace.chosen(token)[i] >= 0) ahead[trace.chosen(token)[i]] += by;
  };
  auto below = [&](int32_t a, int32_t b) { return ahead[a] < ahead[b] || (ahead[a] == ahead[b] && used[a] < used[b]); };
  for (int64_t token = 0; token < std::min(window, tokens); ++token) count(token, 1);
  int64_t clock = 0;
  for (int64_t token = 0; token < tokens; ++token) {
    const int32_t* now = trace.chosen(token);
    int32_t* to = depths + token * top_k;
    int fresh = 0;
    for (int i = 0; i < top_k; ++i) {
      const auto at = std::find(stack.begin(), stack.end(), now[i]);
      const bool first = at == stack.end();
      to[i] = now[i] < 0 ? 0 : static_cast<int32_t>(at - stack.begin()) + 1 + (first ? experts + fresh++ : 0);
    }
    for (int i = 0; i < top_k; ++i) {
      if (now[i] < 0) continue;
      auto end = std::find(stack.begin(), stack.end(), now[i]);
      if (end == stack.end()) {
        stack.push_back(now[i]);
        end = stack.end() - 1;
      }
      int32_t carried = stack.front();  // whoever is worth less goes on down, as far as where the used one was
      for (auto at = stack.begin(); at < end; ++at)
        if (at != stack.begin() && below(*at, carried)) std::swap(*at, carried);
      *end = carried;
      stack.front() = now[i];
      --ahead[now[i]];
      used[now[i]] = ++clock;
    }
    count(token + window, 1);
  }
  return 0;
}
