// Which experts are in the slots of an expert store, and who leaves next: bookkeeping alone, without bytes, files or
// threads, called under the caller's lock. The store runs on it, and the simulator at the end of expert_cache.cpp too,
// so that what is simulated is what runs. An expert is (layer, expert), layers being counted among those that have
// experts.
//
// Whoever runs a layer:
//   routed(layer, ..) once for each token; find() and pin() what is there; take(.., true) and pin() the rest; read,
//   compute; unpin(). While it computes, for each guess about the next layer: expect() if find() has it, else
//   take(.., false) and read.
// Nobody is evicted while pinned. A guess evicts nobody who was guessed and may still be used, nor whom a policy keeps;
// a demand evicts those last. Among equals the one used longest ago leaves, then the lower slot; of one token's experts
// the heaviest counts as the last one used.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace shoal {

// What is worth keeping; the lowest leaves. T, R, F, H: tokens that the current layer has seen, the number of the token
// that used the expert last, its uses, and those at high precision, all in this sequence; D: layers until its layer
// runs again, 0 for the next one. `parameters`:
//   lru      -
//   lfu      -                          F
//   hobbit   lru, lfu, lhu, fld, late   lru R/T + lfu F/T + lhu H/T + fld (1 - D/layers) (Tang et al. 2024)
//   apex     low, late                  C/T, C = H + low (F - H), and 1/(D + 0.1) more if the token before used it
//                                       (MoE-APEX, 2026)
//   mrs      alpha, p                   S = alpha top_p(scores) + (1 - alpha) S at each token (HybriMoE, 2025);
//                                       p of 0: 2 top_k
//   shallow  layers                     lru, but the first layers' experts stay (Fate, 2025); at most half of the slots
//   belady   -                          the next use, as next_use() says: not a policy but the bound of all
// `late` 1 counts D as published, with the current layer as the nearest: its experts, no longer needed, leave last.
enum class ExpertPolicy : int { lru, lfu, hobbit, apex, mrs, shallow, belady };
constexpr int kExpertPolicies = 7;
constexpr int kExpertParameters = 5;

struct ExpertShape {
  int layers, experts, slots;
  bool valid() const;
};

class ExpertCache {
 public:
  // `parameters`: kExpertParameters of them, or null for the defaults. The shape is valid.
  ExpertCache(ExpertShape shape, ExpertPolicy policy, const double* parameters = nullptr);

  // A new sequence: uses are counted anew. What is in the slots stays, and how long ago it was used.
  void restart();

  // One token's routing in `layer`: `ids` [count], the heaviest first, negative ones are nobody; `scores` [experts] or
  // null. Guesses about the layer have had their time: those not used are as any other.
  void routed(int layer, const int32_t* ids, int count, const float* scores);
  // A use that routed() counted was of a low precision.
  void lowered(int layer, int expert) { --of_[id(layer, expert)].high; }

  // Its slot, or -1. Says nothing about whether its bytes are there yet.
  int find(int layer, int expert) const { return of_[id(layer, expert)].slot; }
  // The expert of a slot as layer * experts + expert, or -1.
  int64_t owner(int slot) const { return slots_[slot].owner; }
  // A guess about an expert that has a slot: no other guess takes that before its layer has run.
  void expect(int layer, int expert);

  // A slot for an expert that has none: a free one, else that of the least worth; -1: none may be taken. *evicted: who
  // had it, as owner(); -1 where it was free.
  int take(int layer, int expert, bool demanded, int64_t* evicted);
  // Counted. A pinned slot keeps its expert.
  void pin(int slot) { ++slots_[slot].pins; }
  void unpin(int slot);
  bool pinned(int slot) const { return slots_[slot].pins > 0; }
  // Its bytes never came: nobody has it. It is taken again once it is not pinned.
  void forget(int slot);
  // As many slots. *evicted: who was in those beyond, and their slots. False, and nothing changed, where one of those
  // is pinned, or none would be left.
  bool resize(int slots, std::vector<std::pair<int64_t, int>>* evicted);

  // When an expert is used next, for belady; a larger number is later.
  void next_use(int layer, int expert, int64_t when) { of_[id(layer, expert)].next = when; }

  int slots() const { return shape_.slots; }
  // Whether a guess brought what is in the slot, and nobody has used it since.
  bool unused(int slot) const { return slots_[slot].guessed; }
  // What guesses brought and was used since; what was evicted or forgotten before.
  int64_t useful() const { return useful_; }
  int64_t wasted() const { return wasted_; }

 private:
  struct Expert {
    int32_t slot = -1;
    int32_t uses = 0, high = 0;  // in this sequence
    int64_t token = 0;           // that used it last, counted in its layer from 1; 0: none in this sequence
    int64_t used = 0;            // when; 0: never
    int64_t next = INT64_MAX;
    double score = 0;
  };
  struct Slot {
    int64_t owner = -1;
    int32_t pins = 0;
    bool guessed = false, expected = false;
  };

  size_t id(int layer, int expert) const { return static_cast<size_t>(layer) * shape_.experts + expert; }
  bool stays(int64_t owner) const { return owner < kept_; }
  double worth(int64_t owner) const;
  void leave(int slot);

  ExpertShape shape_;
  ExpertPolicy policy_;
  double parameters_[kExpertParameters];
  std::vector<Expert> of_;       // by layer * experts + expert
  std::vector<Slot> slots_;
  std::vector<int> free_;        // the next one last
  std::vector<int64_t> tokens_;  // by layer, in this sequence
  std::vector<float> sorted_;
  int layer_ = 0;                // that was routed last
  int64_t clock_ = 0;
  int64_t kept_ = 0;             // experts below stay, under shallow
  int64_t useful_ = 0, wasted_ = 0;
};

}  // namespace shoal
