#include "experts.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "crc32.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SHOAL_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SHOAL_WIDE
#endif

namespace shoal {
namespace {

constexpr int kMostThreads = 32;
constexpr int64_t kPart = 128 << 10;  // bytes: smaller reads cost more than they bring sooner
constexpr int kAhead = 2;           // layers about which there are guesses
constexpr double kOfLate = 0.1;     // of a new time in what things take of late
constexpr int kDamaged = -1;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void add(double& mean, double value) { mean = mean ? mean + kOfLate * (value - mean) : value; }

// y[e] += sum of matrix[e] * x over all rows
SHOAL_WIDE void resemble(const float* matrix, int experts, int64_t hidden, const float* x, float* y) {
  for (int e = 0; e < experts; ++e) {
    const float* row = matrix + e * hidden;
    float part[16] = {};
    int64_t i = 0;
    for (; i + 16 <= hidden; i += 16)
      for (int j = 0; j < 16; ++j) part[j] += row[i + j] * x[i + j];
    float sum = 0;
    for (; i < hidden; ++i) sum += row[i] * x[i];
    for (float one : part) sum += one;
    y[e] = sum;
  }
}

}  // namespace

Experts::Experts(const ExpertOptions& options, const std::vector<ExpertRecords>& records)
    : options_(options), records_(records),
      cache_({options.layers, options.experts, options.slots}, options.policy, options.parameters) {
  const auto count = static_cast<size_t>(options.layers) * static_cast<size_t>(options.experts);
  for (ExpertRecords& one : records_) {
    checksums_.emplace_back(one.checksums, one.checksums + count);
    verified_.emplace_back(count, uint8_t{0});
    one.checksums = nullptr;
    slot_bytes_ = std::max(slot_bytes_, one.record());
  }
  seen_.assign(count, 0);
  options_.parameters = nullptr;
}

std::shared_ptr<Experts> Experts::open(int file, const ExpertOptions& options, const std::vector<ExpertRecords>& records,
                                       int* problem) {
  std::shared_ptr<Experts> made(new Experts(options, records));
  made->file_ = -1;
#ifdef O_DIRECT
  char path[40];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", file);  // the very file, whatever its name is by now
  if (options.direct) made->file_ = ::open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
#endif
  if (made->file_ < 0) {
    made->options_.direct = 0;
    made->file_ = fcntl(file, F_DUPFD_CLOEXEC, 0);
  }
  if (made->file_ < 0) return *problem = errno, nullptr;
  // Room for all of them, of which only slots in use are ever touched: so their number may change
  made->reserved_ = static_cast<size_t>(options.layers) * static_cast<size_t>(options.experts) * static_cast<size_t>(made->slot_bytes_);
  void* pool = mmap(nullptr, made->reserved_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pool == MAP_FAILED) return *problem = errno, nullptr;
  made->pool_ = static_cast<uint8_t*>(pool);
  made->slots_.resize(static_cast<size_t>(options.slots));
  for (int i = 0; i < std::clamp(options.threads, 1, kMostThreads); ++i)
    made->threads_.emplace_back([store = made.get()] { store->work(); });
  return made;
}

Experts::~Experts() {
  early.reset();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  asked_.notify_all();
  for (auto& thread : threads_) thread.join();
  if (pool_) munmap(pool_, reserved_);
  if (file_ >= 0) ::close(file_);
}

// Under the lock: the slot's bytes are wanted, and those of `others` besides. One that is waited for is read in parts
// where threads would be idle: a disk gives several reads sooner than one of all their bytes.
void Experts::ask(int slot, int64_t owner, int precision, bool guessed, int others) {
  const int64_t most = records_[static_cast<size_t>(precision)].record() / kPart;
  const auto idle = static_cast<int64_t>(threads_.size()) - static_cast<int64_t>(needed_.size());
  const auto parts = guessed ? 1 : static_cast<int>(std::max<int64_t>(1, std::min(most, idle / (others + 1))));
  slots_[static_cast<size_t>(slot)] = {State::waiting, precision, guessed, 0, parts, ++asks_};
  for (int part = 0; part < parts; ++part) {
    (guessed ? guessed_ : needed_).push_back({slot, owner, precision, part, parts, asks_});
    asked_.notify_one();
  }
}

void Experts::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    asked_.wait(lock, [&] { return closing_ || !needed_.empty() || !guessed_.empty(); });
    if (closing_) return;
    std::deque<Job>& from = needed_.empty() ? guessed_ : needed_;
    const Job job = from.front();
    from.pop_front();
    Slot& slot = slots_[static_cast<size_t>(job.slot)];
    if (cache_.owner(job.slot) != job.owner || slot.asked != job.asked) {
      arrived_.notify_all();  // who waits until nothing is asked for
      continue;
    }
    slot.state = State::reading;
    cache_.pin(job.slot);
    lock.unlock();
    const int64_t began = now();
    int problem = read(job, at(job.slot));
    const int64_t took = now() - began;
    lock.lock();
    counted_.read_ns += took;
    add(record_ns_, static_cast<double>(took * job.parts));
    if (problem) slot.problem = problem;
    if (slot.parts == 1 && !slot.problem) {  // the last: verified by who has its bytes in the caches, if anybody
      lock.unlock();
      problem = verify(job, at(job.slot));
      lock.lock();
      slot.problem = problem;
    }
    cache_.unpin(job.slot);
    if (--slot.parts) continue;
    slot.state = slot.problem ? State::failed : State::ready;
    if (!slot.problem) {
      ++counted_.read_records;
      counted_.read_bytes += records_[static_cast<size_t>(job.precision)].record();
    } else if (slot.guessed) {  // nobody waits for it: whoever needs it will ask again, and be told
      slot.state = State::empty;
      cache_.forget(job.slot);
    }
    arrived_.notify_all();
  }
}

// 0, or a number of errno's.
int Experts::read(const Job& job, uint8_t* to) {
  const ExpertRecords& of = records_[static_cast<size_t>(job.precision)];
  const int64_t pages = of.record() / kExpertAlignment, begin = pages * job.part / job.parts * kExpertAlignment,
                end = pages * (job.part + 1) / job.parts * kExpertAlignment;
  if (options_.rate) pace(end - begin);
  for (int64_t done = begin; done < end;) {
    const ssize_t got = pread(file_, to + done, static_cast<size_t>(end - done), of.at + job.owner * of.record() + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) return EIO;  // the file was cut
    done += got;
  }
  return 0;
}

// 0, or kDamaged: of a record that was never read before.
int Experts::verify(const Job& job, const uint8_t* record) {
  const auto precision = static_cast<size_t>(job.precision), owner = static_cast<size_t>(job.owner);
  uint8_t& verified = verified_[precision][owner];
  if (__atomic_load_n(&verified, __ATOMIC_RELAXED)) return 0;
  if (crc32(record, static_cast<size_t>(records_[precision].record())) != checksums_[precision][owner]) return kDamaged;
  __atomic_store_n(&verified, uint8_t{1}, __ATOMIC_RELAXED);
  return 0;
}

// Sleeps so long that all reads together stay within the rate.
void Experts::pace(int64_t bytes) {
  int64_t until;
  {
    std::lock_guard<std::mutex> lock(pacing_);
    until = free_ns_ = std::max(free_ns_, now()) + static_cast<int64_t>(static_cast<double>(bytes) * 1e9 / static_cast<double>(options_.rate));
  }
  std::this_thread::sleep_until(std::chrono::steady_clock::time_point(std::chrono::nanoseconds(until)));
}

void Experts::fail(int layer, int expert, int slot) {
  const int problem = slots_[static_cast<size_t>(slot)].problem;
  slots_[static_cast<size_t>(slot)].state = State::empty;
  cache_.forget(slot);
  std::string why = problem == kDamaged ? "it is damaged, its checksum does not match" : std::strerror(problem);
  throw ExpertError{"Expert " + std::to_string(expert) + " of layer " + std::to_string(layer) + " cannot be read: " + why + "."};
}

std::unique_ptr<Experts::Pass> Experts::begin(int layer, const std::vector<int>& wanted, const std::vector<int>& precisions) {
  std::unique_ptr<Pass> pass(new Pass(*this, layer));
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t time = now();
  if (last_ns_) add(layer_ns_, static_cast<double>(time - last_ns_));
  last_ns_ = time;
  ++counted_.passes;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const int expert = wanted[i];
    Pass::Want want{expert, precisions.empty() ? 0 : precisions[i], -1, false, false};
    const int slot = cache_.find(layer, expert);
    const int64_t owner = static_cast<int64_t>(layer) * options_.experts + expert;
    if (slot >= 0) {
      Slot& of = slots_[static_cast<size_t>(slot)];
      // A guess that waits still is not one any more: it goes before all others
      if (of.state == State::failed || of.precision > want.precision) {
        // For a pass that ended before it saw that; or not as well as it is wanted: what is being read so is read again
        if (of.state != State::reading) ask(slot, owner, want.precision, false);
        want.late = true;
        ++counted_.misses;
      } else if (of.state == State::waiting && of.guessed) {
        if (want.precision >= of.precision) want.precision = of.precision;
        ask(slot, owner, want.precision, false);
        guessed_.erase(std::remove_if(guessed_.begin(), guessed_.end(), [&](const Job& job) { return job.slot == slot; }), guessed_.end());
        want.late = true;
        ++counted_.late;
      } else if (of.state == State::reading) {
        want.late = of.guessed;
        if (of.guessed) ++counted_.late;
        of.guessed = false;
      }
      if (!want.late) ++counted_.hits;
      of.guessed = false;
      cache_.pin(slot);
      want.slot = slot;
    } else {
      ++counted_.misses;
      if (!seen_[static_cast<size_t>(owner)]) ++counted_.first_misses;
    }
    seen_[static_cast<size_t>(owner)] = 1;
    pass->wants_.push_back(want);
  }
  pass->left_ = static_cast<int>(pass->wants_.size());
  pass->start();
  return pass;
}

// Under the lock: asks for what has no slot yet, as far as slots go.
void Experts::Pass::start() {
  auto missing = static_cast<int>(std::count_if(wants_.begin(), wants_.end(), [](const Want& want) { return want.slot < 0 && !want.given; }));
  for (Want& want : wants_) {
    if (want.slot >= 0 || want.given) continue;
    int64_t evicted;
    const int slot = store_.cache_.take(layer_, want.expert, true, &evicted);
    if (slot < 0) break;
    store_.cache_.pin(slot);
    want.slot = slot;
    store_.ask(slot, static_cast<int64_t>(layer_) * store_.options_.experts + want.expert, want.precision, false, --missing);
  }
}

std::vector<ExpertReady> Experts::Pass::next() {
  std::vector<ExpertReady> found;
  std::unique_lock<std::mutex> lock(store_.mutex_);
  if (!left_) return found;
  const int64_t began = now();
  for (bool waited = false;; waited = true) {
    bool hope = false;
    for (size_t i = 0; i < wants_.size(); ++i) {
      Want& want = wants_[i];
      if (want.given || want.slot < 0) continue;
      Slot& slot = store_.slots_[static_cast<size_t>(want.slot)];
      if (slot.state == State::failed) {
        const int at = want.slot;
        store_.cache_.unpin(at);
        want.slot = -1;
        want.given = true;
        --left_;
        store_.fail(layer_, want.expert, at);
      }
      if (slot.state == State::ready && slot.precision > want.precision)
        store_.ask(want.slot, static_cast<int64_t>(layer_) * store_.options_.experts + want.expert, want.precision, false);
      if (slot.state == State::ready) {
        want.given = true;
        --left_;
        if (slot.precision) {
          store_.cache_.lowered(layer_, want.expert);
          ++store_.counted_.low;
        }
        found.push_back({static_cast<int>(i), store_.at(want.slot), slot.precision});
      } else {
        hope = true;
      }
    }
    if (!found.empty()) {
      if (waited) store_.counted_.waited_ns += now() - began;
      return found;
    }
    if (!hope) {
      start();
      if (std::none_of(wants_.begin(), wants_.end(), [](const Want& want) { return !want.given && want.slot >= 0; })) {
        // Every slot is pinned by a guess that is being read: it will be over
        store_.arrived_.wait(lock);
        start();
        continue;
      }
    }
    store_.arrived_.wait(lock);
  }
}

void Experts::Pass::done(const ExpertReady& ready) {
  std::lock_guard<std::mutex> lock(store_.mutex_);
  Want& want = wants_[static_cast<size_t>(ready.index)];
  store_.cache_.unpin(want.slot);
  want.slot = -1;
  if (left_) start();
}

Experts::Pass::~Pass() {
  std::lock_guard<std::mutex> lock(store_.mutex_);
  for (Want& want : wants_)
    if (want.slot >= 0) store_.cache_.unpin(want.slot);
}

bool Experts::Pass::wants(int expert) const {
  return std::any_of(wants_.begin(), wants_.end(), [&](const Want& want) { return want.expert == expert; });
}

void Experts::skipped() {
  std::lock_guard<std::mutex> lock(mutex_);
  ++counted_.skipped;
}

void Experts::routed(int layer, const int32_t* ids, int count, const float* scores) {
  std::lock_guard<std::mutex> lock(mutex_);
  cache_.routed(layer, ids, count, scores);
}

void Experts::guess(int layer, const float* x, int64_t rows, int top_k, const std::vector<int>& ranks) {
  if (!options_.predictor) return;
  const int experts = options_.experts;
  std::vector<float> one(static_cast<size_t>(experts)), worth(static_cast<size_t>(experts));
  std::vector<int> order(static_cast<size_t>(experts));
  for (int ahead = 1; ahead <= kAhead && layer + ahead < options_.layers; ++ahead) {
    const float* matrix = options_.predictor + static_cast<int64_t>(layer + ahead - 1) * experts * hidden();
    std::fill(worth.begin(), worth.end(), 0.f);
    for (int64_t row = 0; row < rows; ++row) {
      resemble(matrix, experts, hidden(), x + row * hidden(), one.data());
      const float top = *std::max_element(one.begin(), one.end());
      for (int e = 0; e < experts; ++e) worth[static_cast<size_t>(e)] += std::exp(one[static_cast<size_t>(e)] - top);
    }
    for (int e = 0; e < experts; ++e) order[static_cast<size_t>(e)] = e;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return worth[static_cast<size_t>(a)] > worth[static_cast<size_t>(b)]; });
    std::lock_guard<std::mutex> lock(mutex_);
    // Who is needed most waits for nobody: reads beyond what a layer's time has room for would only be in the way
    const double time = record_ns_ > 0 ? layer_ns_ * static_cast<double>(threads_.size()) / record_ns_ : top_k;
    int64_t room = std::max<int64_t>(1, static_cast<int64_t>(time) - static_cast<int64_t>(guessed_.size()));
    const int more = options_.expand < 0 ? top_k : options_.expand;
    const int64_t most = std::min<int64_t>(experts, (rows == 1 ? top_k : std::min<int64_t>(rows * top_k, experts)) + more);
    bool all = true;
    for (int64_t i = 0; i < most && room > 0; ++i) {
      const int expert = order[static_cast<size_t>(i)];
      if (cache_.find(layer + ahead, expert) >= 0) {
        if (i < top_k) cache_.expect(layer + ahead, expert);
        continue;
      }
      if (i >= top_k && ahead > 1) break;
      const int precision = ranks.empty() ? 0 : ranks[std::min(static_cast<size_t>(i), ranks.size() - 1)];
      if (precision < 0) break;
      int64_t evicted;
      const int slot = cache_.take(layer + ahead, expert, false, &evicted);
      if (slot < 0) break;
      all = false;
      ask(slot, static_cast<int64_t>(layer + ahead) * experts + expert, precision, true);
      ++counted_.guesses;
      --room;
    }
    if (!all) return;  // further on only where the nearest is done
  }
}

void Experts::restart() {
  std::lock_guard<std::mutex> lock(mutex_);
  cache_.restart();
}

bool Experts::resize(int slots) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (slots < 1 || slots > options_.layers * options_.experts) return false;
  for (const Job& job : guessed_)
    if (cache_.owner(job.slot) == job.owner && slots_[static_cast<size_t>(job.slot)].state == State::waiting) {
      slots_[static_cast<size_t>(job.slot)].state = State::empty;
      cache_.forget(job.slot);
    }
  guessed_.clear();
  // What a pass that was given up has asked for comes still, into slots that may not be there then
  arrived_.wait(lock, [&] {
    return needed_.empty() && std::none_of(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.state == State::reading; });
  });
  std::vector<std::pair<int64_t, int>> evicted;
  if (!cache_.resize(slots, &evicted)) return false;
  const auto before = static_cast<int>(slots_.size());
  slots_.resize(static_cast<size_t>(slots));
  options_.slots = slots;
  if (slots < before) madvise(at(slots), static_cast<size_t>(before - slots) * static_cast<size_t>(slot_bytes_), MADV_DONTNEED);
  return true;
}

ExpertCounters Experts::counters() {
  std::lock_guard<std::mutex> lock(mutex_);
  counted_.useful = cache_.useful();
  counted_.wasted = cache_.wasted();
  return counted_;
}

bool Experts::resident(int layer, int expert) {
  std::lock_guard<std::mutex> lock(mutex_);
  const int slot = cache_.find(layer, expert);
  return slot >= 0 && slots_[static_cast<size_t>(slot)].state == State::ready;
}

}  // namespace shoal
