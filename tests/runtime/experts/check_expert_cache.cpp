// Random calls of ExpertCache, each followed by what has to hold: an expert has at most one slot and a slot one expert,
// nobody pinned or guessed lately is evicted by whom may not, and every slot can be had again.
//
//   check_expert_cache [seed [rounds]]      exits with 1 at the first difference
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "expert_cache.h"

using namespace shoal;

namespace {

unsigned seed = 1;
int at = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED (seed %u, round %d): %s\n", seed, at, what);
  std::exit(1);
}

}  // namespace

int main(int count, char** words) {
  if (count > 1) seed = static_cast<unsigned>(std::atoi(words[1]));
  const int rounds = count > 2 ? std::atoi(words[2]) : 100;
  std::mt19937 engine(seed);
  auto below = [&](int most) { return static_cast<int>(engine() % static_cast<unsigned>(most)); };
  for (at = 0; at < rounds; ++at) {
    const int layers = 1 + below(4), experts = 1 + below(9);
    int slots = 1 + below(layers * experts + 2);
    const auto policy = static_cast<ExpertPolicy>(at % kExpertPolicies);
    ExpertCache cache({layers, experts, slots}, policy);
    std::map<int64_t, int> holds;   // what each expert has
    std::multiset<int> pins;
    std::set<int64_t> guessed;      // and not run since
    auto consistent = [&] {
      int held = 0;
      for (int layer = 0; layer < layers; ++layer)
        for (int expert = 0; expert < experts; ++expert) {
          const int64_t owner = static_cast<int64_t>(layer) * experts + expert;
          const auto found = holds.find(owner);
          const int slot = cache.find(layer, expert);
          expect(slot == (found == holds.end() ? -1 : found->second), "an expert is not where it was put");
          if (slot < 0) continue;
          ++held;
          expect(slot < cache.slots() && cache.owner(slot) == owner, "a slot has another expert");
        }
      expect(held <= cache.slots(), "more experts than slots");
      for (int slot = 0; slot < cache.slots(); ++slot)
        expect(cache.pinned(slot) == (pins.count(slot) > 0), "a pin is lost");
    };
    for (int step = 0; step < 200; ++step) {
      const int layer = below(layers), expert = below(experts), slot = cache.find(layer, expert);
      const int64_t owner = static_cast<int64_t>(layer) * experts + expert;
      switch (below(8)) {
        case 0: {
          std::vector<int32_t> ids{expert, -1};
          std::vector<float> scores(static_cast<size_t>(experts), 0.5f);
          cache.routed(layer, ids.data(), 2, below(2) ? scores.data() : nullptr);
          for (auto one = guessed.begin(); one != guessed.end();)
            one = *one / experts == layer ? guessed.erase(one) : std::next(one);
          break;
        }
        case 1:
        case 2:
        case 3: {
          if (slot >= 0) {
            cache.expect(layer, expert);
            guessed.insert(owner);
            break;
          }
          const bool demanded = below(2);
          int64_t evicted = -2;
          const int taken = cache.take(layer, expert, demanded, &evicted);
          if (taken < 0) {
            expect(evicted == -1, "nobody was evicted");
            if (demanded) {
              int pinned = 0;
              for (int i = 0; i < cache.slots(); ++i) pinned += cache.pinned(i);
              expect(pinned == cache.slots(), "a demand was refused though a slot was not pinned");
            }
            break;
          }
          expect(!pins.count(taken), "a pinned slot was taken");
          expect(evicted >= 0 || static_cast<int>(holds.size()) < cache.slots(), "a free slot came from nowhere");
          if (evicted >= 0) {
            expect(holds.count(evicted) && holds[evicted] == taken, "the evicted had another slot");
            expect(demanded || !guessed.count(evicted), "a guess evicted a guess");
            std::set<int> waiting;  // forgotten, and pinned
            for (int i : pins)
              if (cache.owner(i) < 0) waiting.insert(i);
            const bool full = holds.size() + waiting.size() == static_cast<size_t>(cache.slots());
            expect(full, "somebody was evicted though a slot was free");
            holds.erase(evicted);
            guessed.erase(evicted);
          }
          holds[owner] = taken;
          if (!demanded) guessed.insert(owner);
          break;
        }
        case 4:
          if (slot >= 0) {
            cache.pin(slot);
            pins.insert(slot);
          }
          break;
        case 5:
          if (!pins.empty()) {
            cache.unpin(*pins.begin());
            pins.erase(pins.begin());
          }
          break;
        case 6:
          if (below(4) == 0 && slot >= 0) {
            cache.forget(slot);
            holds.erase(owner);
            guessed.erase(owner);
          } else if (below(8) == 0) {
            cache.restart();
          }
          break;
        case 7:
          if (below(8) == 0) {
            std::vector<std::pair<int64_t, int>> gone;
            const int fewer = below(layers * experts + 2);
            const bool blocked = fewer < 1 || (!pins.empty() && *pins.rbegin() >= fewer);
            expect(cache.resize(fewer, &gone) == !blocked, "resize");
            expect(!blocked || gone.empty(), "somebody left though nothing changed");
            for (const auto& [who, where] : gone) {
              expect(where >= fewer && holds.count(who) && holds[who] == where, "the wrong one left");
              holds.erase(who);
              guessed.erase(who);
            }
            if (!blocked) expect(cache.slots() == fewer, "another number of slots");
          }
          break;
      }
      consistent();
    }
    while (!pins.empty()) {
      cache.unpin(*pins.begin());
      pins.erase(pins.begin());
    }
    for (int layer = 0; layer < layers; ++layer)  // every slot can still be used
      for (int expert = 0; expert < experts; ++expert) {
        int64_t evicted;
        expect(cache.take(layer, expert, true, &evicted) >= 0, "a slot is lost");
      }
  }
  std::printf("all as it should be\n");
}
