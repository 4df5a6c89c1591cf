// Experts on flash: a fixed pool of slots, threads that read records into them, and the passes of layers over them.
//
// A store holds some of all experts of a model, each the record that runtime/experts/layout.py describes. A run of a layer
// is a Pass: it names the experts it needs, the most wanted first; those that are in slots are pinned, the others are read,
// and next() gives whichever is there. What a pass needs is always read before what is only guessed. A guess that was
// wrong costs a read and a slot's content, never a result: which experts are resident changes no bit of any.
//
// A record's checksum is verified the first time it is read. What cannot be read, or is damaged, ends the pass with a
// message that names layer and expert; the store lives on and tries again when it is asked again.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "expert_cache.h"
#include "gathered.h"

namespace shoal {

constexpr int kExpertAlignment = 4096;

// How every expert is stored, at file offset `at` of the first.
struct ExpertRecords {
  int64_t at;
  LinearFormat gate_up, down;
  const uint32_t* checksums;  // [layers * experts]; copied
  bool gathered = false;      // whether the matrices are as gathered.h has them

  int64_t down_at() const { return (gate_up.bytes() + 63) / 64 * 64; }
  int64_t down_bytes() const { return gathered ? GatheredDown(down).bytes : down.bytes(); }
  int64_t record() const { return (down_at() + down_bytes() + kExpertAlignment - 1) / kExpertAlignment * kExpertAlignment; }
};

struct ExpertCounters {
  int64_t hits, misses, first_misses;       // of what passes asked for; first: never read before
  int64_t read_records, read_bytes;         // in all, guesses included
  int64_t guesses, useful, late, wasted;    // reads that were guesses; used in time; used, but waited for; evicted unused
  int64_t waited_ns, read_ns;               // passes with nothing to compute; reads, added up over threads
  int64_t low, skipped;                     // uses of chosen experts at low precision, or not at all
  int64_t passes;
};

struct ExpertOptions {
  int layers, experts, slots, threads;
  ExpertPolicy policy;
  const double* parameters;
  int64_t rate;              // bytes a second at most, 0: as fast as it goes
  int direct;                // read past the page cache where the file system can
  const float* predictor;    // [layers - 1][experts][hidden] or null; kept alive by who opens
  int expand;                // guesses beyond top_k at most; below 0: as many as there is time to read
  float low, skip;           // unimportance above which a miss is read at low precision, or not at all; 1: never
};

// One expert of a pass: its bytes, pinned until done() with it.
struct ExpertReady {
  int index;                 // into what the pass wanted
  const uint8_t* record;
  int precision;
};

class Experts {
 public:
  // Null and `*problem` a number of errno's where it cannot be.
  static std::shared_ptr<Experts> open(int file, const ExpertOptions&, const std::vector<ExpertRecords>&, int* problem);
  ~Experts();

  class Pass {
   public:
    ~Pass();
    // The experts whose bytes are there and that were not given before, waiting until there is one; empty when all were
    // given. Throws ExpertError.
    std::vector<ExpertReady> next();
    void done(const ExpertReady&);
    int layer() const { return layer_; }
    size_t size() const { return wants_.size(); }
    bool wants(int expert) const;

   private:
    friend class Experts;
    struct Want {
      int expert, precision, slot;
      bool given, late;
    };
    Pass(Experts& store, int layer) : store_(store), layer_(layer) {}
    void start();
    Experts& store_;
    int layer_;
    std::vector<Want> wants_;
    int left_ = 0;
  };

  // One at a time. `wanted` are different experts, `precisions` how each is wanted where it has to be read.
  std::unique_ptr<Pass> begin(int layer, const std::vector<int>& wanted, const std::vector<int>& precisions);
  void routed(int layer, const int32_t* ids, int count, const float* scores);
  // Guesses about the layers behind `layer` from its inputs, fp32 [rows][hidden]; while a pass computes. `ranks` says how
  // the first, second, .. of them is read, below 0 not at all; empty: in full.
  void guess(int layer, const float* x, int64_t rows, int top_k, const std::vector<int>& ranks);
  void restart();
  // False where a pass is under way that needs more.
  bool resize(int slots);
  ExpertCounters counters();
  bool resident(int layer, int expert);
  // What is chosen does not matter enough to be read.
  void skipped();

  const ExpertRecords& records(int precision) const { return records_[static_cast<size_t>(precision)]; }
  int precisions() const { return static_cast<int>(records_.size()); }
  const ExpertOptions& options() const { return options_; }
  int64_t hidden() const { return records_[0].gate_up.inputs; }
  int64_t ffn() const { return records_[0].down.inputs; }

  // Passes that a router which reads before attention began, until their layer takes them.
  std::unique_ptr<Pass> early;
  std::mutex running;  // one run of a graph at a time

  // Records of routing: of each layer ids [rows][top_k], scores [rows][experts], inputs [rows][hidden], as asked for.
  struct Trace {
    bool on = false, scores = false, inputs = false;
    int64_t most = 0;  // rows of a layer
    std::vector<std::vector<int16_t>> ids;
    std::vector<std::vector<float>> score, input;
  } trace;

 private:
  enum class State : uint8_t { empty, waiting, reading, ready, failed };
  struct Slot {
    State state = State::empty;
    int precision = 0;
    bool guessed = false;   // read, or waiting to be, for a guess
    int problem = 0;        // of errno's; -1: damaged
    int parts = 0;          // of the record that are not there yet
    uint64_t asked = 0;     // when it was, counted: parts that were asked for earlier are nobody's
  };
  struct Job {              // part `part` of `parts` of a record
    int slot;
    int64_t owner;
    int precision, part, parts;
    uint64_t asked;
  };

  Experts(const ExpertOptions&, const std::vector<ExpertRecords>&);
  void work();
  int read(const Job&, uint8_t* to);
  int verify(const Job&, const uint8_t* record);
  void pace(int64_t bytes);
  uint8_t* at(int slot) const { return pool_ + static_cast<int64_t>(slot) * slot_bytes_; }
  void ask(int slot, int64_t owner, int precision, bool guessed, int others = 0);
  [[noreturn]] void fail(int layer, int expert, int slot);

  ExpertOptions options_;
  std::vector<ExpertRecords> records_;
  std::vector<std::vector<uint32_t>> checksums_;
  std::vector<std::vector<uint8_t>> verified_;
  std::vector<uint8_t> seen_;
  int64_t slot_bytes_ = 0;
  uint8_t* pool_ = nullptr;
  size_t reserved_ = 0;
  int file_ = -1;

  std::mutex mutex_;  // of all below
  std::condition_variable asked_, arrived_;
  ExpertCache cache_;
  std::vector<Slot> slots_;
  std::deque<Job> needed_, guessed_;
  uint64_t asks_ = 0;
  std::vector<std::thread> threads_;
  bool closing_ = false;
  ExpertCounters counted_{};
  double layer_ns_ = 0, record_ns_ = 0;  // what a layer takes, and a read, of late
  int64_t last_ns_ = 0;

  std::mutex pacing_;
  int64_t free_ns_ = 0;
};

struct ExpertError {
  std::string what;
};

std::shared_ptr<Experts> experts_of(int64_t handle);

}  // namespace shoal
