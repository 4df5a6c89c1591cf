// A store among everything that may happen to it: passes that are whole, given up or begun early, guesses, resizes and
// questions from other threads, records that are damaged or cut off. What a pass is given are the right bytes, what it is
// refused is broken, and each expert that was asked for is counted once. Built with a sanitizer, which sees the rest.
//
//   check_experts [seed [rounds]]      exits with 1 at the first difference
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

#include "crc32.h"
#include "experts.h"
#include "isa.h"

namespace shoal {

// Checksums by tables: which instructions there are is not asked here, and needs all other kernels
const Isa& isa() {
  static const Isa none{};
  return none;
}

}  // namespace shoal

using namespace shoal;

namespace {

unsigned seed = 1;
int at = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED (seed %u, round %d): %s\n", seed, at, what);
  std::exit(1);
}

constexpr int kPasses = 60;

}  // namespace

int main(int count, char** words) {
  if (count > 1) seed = static_cast<unsigned>(std::atoi(words[1]));
  const int rounds = count > 2 ? std::atoi(words[2]) : 20;
  std::mt19937 engine(seed);
  auto below = [&](int most) { return static_cast<int>(engine() % static_cast<unsigned>(most)); };
  int refused = 0, given = 0;
  for (at = 0; at < rounds; ++at) {
    const bool large = below(4) == 0;  // enough to be read in parts
    const int hidden = large ? 512 : 64, ffn = large ? 704 : 32;
    const int layers = 1 + below(3), experts = 1 + below(large ? 3 : 8), all = layers * experts, precisions = 1 + below(2);
    // A file of records, whose last ones are cut off in some rounds, and some of which are not what they were
    std::vector<ExpertRecords> records{{0, {hidden, 2 * ffn, 4, 64, 64, false}, {ffn, hidden, 4, 64, 64, false}, nullptr},
                                       {0, {hidden, 2 * ffn, 2, 64, 64, false}, {ffn, hidden, 2, 64, 64, false}, nullptr}};
    records.resize(static_cast<size_t>(precisions));
    std::vector<uint8_t> bytes;
    std::vector<std::vector<uint32_t>> checksums;
    for (ExpertRecords& of : records) {
      of.at = static_cast<int64_t>(bytes.size());
      bytes.resize(bytes.size() + static_cast<size_t>(all * of.record()));
    }
    for (size_t i = 0; i < bytes.size(); i += 4) {
      const auto word = static_cast<uint32_t>(engine());
      std::memcpy(bytes.data() + i, &word, 4);
    }
    std::vector<std::vector<bool>> broken;
    const bool damage = below(2);
    const auto whole = static_cast<int64_t>(bytes.size()) - (below(2) ? 0 : below(2 * kExpertAlignment));
    for (ExpertRecords& of : records) {
      auto& sums = checksums.emplace_back();
      auto& bad = broken.emplace_back();
      for (int owner = 0; owner < all; ++owner) {
        const int64_t from = of.at + owner * of.record();
        const bool wrong = damage && below(8) == 0;
        sums.push_back(crc32(bytes.data() + from, static_cast<size_t>(of.record())) ^ (wrong ? 1u : 0u));
        bad.push_back(wrong || from + of.record() > whole);
      }
      of.checksums = sums.data();
    }
    std::FILE* file = std::tmpfile();
    expect(file && std::fwrite(bytes.data(), 1, static_cast<size_t>(whole), file) == static_cast<size_t>(whole) && !std::fflush(file),
           "there is no file");

    std::vector<float> predictor(static_cast<size_t>(std::max(layers - 1, 1) * experts * hidden));
    for (float& value : predictor) value = static_cast<float>(below(201) - 100) / 100;
    int problem = 0;
    const int policies[] = {0, 1, 2, 3, 4, 5};
    auto store = Experts::open(fileno(file), {layers, experts, 1 + below(all), 1 + below(4), static_cast<ExpertPolicy>(policies[below(6)]),
                                              nullptr, large || below(4) ? 0 : 50'000'000, 0, below(3) ? predictor.data() : nullptr, below(3) - 1, 1, 1},
                               records, &problem);
    std::fclose(file);  // a store has its own
    expect(store != nullptr, "it was not opened");

    std::atomic<bool> over{false};
    std::thread asking([&] {
      while (!over) {
        store->counters();
        store->resident(0, 0);
        std::this_thread::yield();
      }
    });
    std::thread moving([&, own = std::mt19937(engine())]() mutable {
      while (!over) {
        {
          std::lock_guard<std::mutex> running(store->running);
          store->early.reset();
          expect(store->resize(1 + static_cast<int>(own() % static_cast<unsigned>(all))), "it was not resized");
        }
        std::this_thread::sleep_for(std::chrono::microseconds(own() % 300));
      }
    });

    int64_t asked = 0;
    std::vector<int> order(static_cast<size_t>(experts));
    std::iota(order.begin(), order.end(), 0);
    std::vector<float> x(static_cast<size_t>(hidden)), scores(static_cast<size_t>(experts), 1.f);
    for (int pass_of = 0; pass_of < kPasses; ++pass_of) {
      const int layer = pass_of % layers, wants = 1 + below(experts);
      std::shuffle(order.begin(), order.end(), engine);
      const std::vector<int> wanted(order.begin(), order.begin() + wants);
      std::vector<int> how;
      if (precisions > 1 && below(2))
        for (int i = 0; i < wants; ++i) how.push_back(below(2));
      std::unique_lock<std::mutex> running(store->running);
      const std::vector<int32_t> ids(wanted.begin(), wanted.end());
      store->routed(layer, ids.data(), wants, scores.data());
      if (below(20) == 0) store->restart();
      store->early.reset();
      store->early = store->begin(layer, wanted, how);
      asked += wants;
      if (below(3) == 0) {  // it was begun before attention, and somebody resizes meanwhile
        running.unlock();
        std::this_thread::yield();
        running.lock();
        if (!store->early) continue;
      }
      auto pass = std::move(store->early);
      for (float& value : x) value = static_cast<float>(below(201) - 100) / 100;
      std::vector<int> ranks;
      if (below(2)) ranks = {0, precisions - 1 - below(2)};
      store->guess(layer, x.data(), 1, std::min(2, experts), ranks);
      try {
        int left = wants;
        for (auto ready = pass->next(); !ready.empty(); ready = pass->next()) {
          for (const ExpertReady& one : ready) {
            const int owner = layer * experts + wanted[static_cast<size_t>(one.index)];
            const ExpertRecords& of = records[static_cast<size_t>(one.precision)];
            expect(!broken[static_cast<size_t>(one.precision)][static_cast<size_t>(owner)], "what is broken was given");
            expect(!std::memcmp(one.record, bytes.data() + of.at + owner * of.record(), static_cast<size_t>(of.record())),
                   "bytes are not the expert's");
            expect(how.empty() || one.precision <= how[static_cast<size_t>(one.index)], "it is worse than was wanted");
            --left, ++given;
          }
          if (below(30) == 0) {  // who computes gives up
            left = 0;
            break;
          }
          for (const ExpertReady& one : ready) pass->done(one);
        }
        expect(!left, "not all were given");
      } catch (const ExpertError& error) {
        ++refused;
        bool named = false;
        for (int expert : wanted) {
          bool bad = false;
          for (const auto& of : broken) bad |= of[static_cast<size_t>(layer * experts + expert)];
          named |= bad && error.what.find("Expert " + std::to_string(expert) + " of layer " + std::to_string(layer) + " ") == 0;
        }
        expect(named, "what was refused is whole");
      }
    }
    over = true;
    asking.join();
    moving.join();
    const ExpertCounters counted = store->counters();
    expect(counted.hits + counted.misses + counted.late == asked, "an expert was counted twice, or not");
    expect(counted.useful + counted.wasted <= counted.guesses && counted.first_misses <= counted.misses, "counters that cannot be");
  }
  expect(rounds < 20 || (given && refused), "nothing was given, or nothing refused");
  std::printf("all as it should be: %d given, %d refused\n", given, refused);
}
