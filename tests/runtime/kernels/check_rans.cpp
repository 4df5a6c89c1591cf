// rANS of random tables and symbols there and back; and bytes that were damaged, cut, grown or made up: a decoder refuses
// them, or an encoder makes the same of what it decoded. Every buffer is as large as it must be, for a sanitizer to see.
#include "rans.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

namespace {

using namespace shoal;

std::mt19937 random_;

int64_t below(int64_t limit) { return static_cast<int64_t>(random_() % static_cast<uint32_t>(limit)); }

struct Tables {
  std::vector<uint16_t> of;
  std::vector<uint32_t> symbols;
  std::vector<uint8_t> slots;

  Tables(const RansFormat& format) : of(static_cast<size_t>(format.channels)) {
    const int64_t tables = 1 + below(3), levels = int64_t{1} << format.bits, total = 1 << kRansBits;
    for (auto& one : of) one = static_cast<uint16_t>(below(tables));
    for (int64_t table = 0; table < tables; ++table) {
      std::vector<int64_t> cuts{0};  // where intervals begin: in one place or everywhere
      const int64_t span = below(3) ? total - levels : 0;
      for (int64_t i = 1; i < levels; ++i) cuts.push_back(span ? below(span) : below(2) * (total - levels));
      std::sort(cuts.begin(), cuts.end());
      for (int64_t i = 0; i < levels; ++i) {
        const int64_t start = cuts[i] + i, next = i + 1 < levels ? cuts[i + 1] + i + 1 : total;
        symbols.push_back(static_cast<uint32_t>(next - start) | static_cast<uint32_t>(start) << 16);
        slots.insert(slots.end(), static_cast<size_t>(next - start), static_cast<uint8_t>(i));
      }
    }
  }
};

std::vector<uint8_t> encoded(const RansFormat& format, const RansTables& tables, const std::vector<uint8_t>& symbols) {
  std::vector<uint8_t> room(static_cast<size_t>(format.most_bytes()));
  const int64_t size = rans_encode(format, tables, symbols.data(), room.data() + room.size());
  return {room.end() - size, room.end()};
}

// False if bytes were taken that are not what an encoder makes.
bool holds(const RansFormat& format, const RansTables& tables, const std::vector<uint8_t>& bytes, bool* taken) {
  std::vector<uint8_t> symbols(static_cast<size_t>(format.elements()));
  const std::unique_ptr<uint8_t[]> exact(new uint8_t[bytes.size()]);  // a vector may have room to spare
  std::copy(bytes.begin(), bytes.end(), exact.get());
  *taken = rans_decode(format, tables, exact.get(), static_cast<int64_t>(bytes.size()), symbols.data());
  return !*taken || encoded(format, tables, symbols) == bytes;
}

}  // namespace

int main(int count, char** arguments) {
  random_.seed(static_cast<unsigned>(count > 1 ? std::atoi(arguments[1]) : 1));
  const int rounds = count > 2 ? std::atoi(arguments[2]) : 100;
  long long damaged = 0, taken = 0;
  for (int round = 0; round < rounds; ++round) {
    const bool many = round % 25 == 24;
    const RansFormat format{static_cast<int>(1 + below(8)), 1 + below(3), 1 + below(5), many ? kRansMany + below(9) : 1 + below(40)};
    const Tables made(format);
    const RansTables tables{made.of.data(), made.symbols.data(), made.slots.data()};
    std::vector<uint8_t> symbols(static_cast<size_t>(format.elements())), back(symbols.size());
    const int64_t likely = below(1 << kRansBits);
    for (auto& symbol : symbols) symbol = made.slots[static_cast<size_t>(below(4) ? likely : below(1 << kRansBits))];
    const auto bytes = encoded(format, tables, symbols);
    if (!rans_decode(format, tables, bytes.data(), static_cast<int64_t>(bytes.size()), back.data()) || back != symbols) {
      std::fprintf(stderr, "round %d: %zu symbols of %d bits do not come back\n", round, symbols.size(), format.bits);
      return 1;
    }
    if (format.bits < 8) {
      auto wrong = symbols;
      wrong[static_cast<size_t>(below(static_cast<int64_t>(wrong.size())))] = static_cast<uint8_t>(1 << format.bits);
      std::vector<uint8_t> room(static_cast<size_t>(format.most_bytes()));
      if (rans_encode(format, tables, wrong.data(), room.data() + room.size()) >= 0) return 1;
    }
    for (int i = 0; i < (many ? 20 : 400); ++i) {
      auto mutated = bytes;
      if (below(8) == 0) mutated.assign(static_cast<size_t>(below(40)), 0);
      for (int64_t changes = below(4); changes-- > 0 && !mutated.empty();)
        mutated[static_cast<size_t>(below(static_cast<int64_t>(mutated.size())))] = static_cast<uint8_t>(random_());
      if (below(3) == 0) mutated.resize(static_cast<size_t>(below(static_cast<int64_t>(mutated.size()) + 3)));
      bool decoded;
      if (!holds(format, tables, mutated, &decoded)) {
        std::fprintf(stderr, "round %d: bytes are taken that no encoder makes\n", round);
        return 1;
      }
      damaged += mutated != bytes;
      taken += decoded && mutated != bytes;
    }
  }
  if (RansFormat{8, kRansMost, 2, 1}.valid() || RansFormat{8, kRansMost, kRansMost, kRansMost}.valid()) return 1;
  if (RansFormat{9, 1, 1, 1}.valid() || RansFormat{0, 1, 1, 1}.valid() || RansFormat{8, 0, 1, 1}.valid()) return 1;
  std::printf("all as it should be; of %lld damaged strings, %lld are of other symbols\n", damaged, taken);
}
