// rANS (Duda 2013, arXiv:1311.2540), the range variant of asymmetric numeral systems: what a latent's symbols are coded
// with. docs/split.md lays the bytes down; runtime/split/rans.py is the same in Python, byte for byte.
//
// Frequencies of a table add up to 2^14. States have 32 bits and give or take words of 16. Few symbols go through one
// state, which begins low and is written in as few bytes as it needs; many go through kRansLanes of them in turn.
#pragma once
#include <cstddef>
#include <cstdint>

namespace shoal {

constexpr int kRansBits = 14;
constexpr uint32_t kRansLow = 1u << 16;          // a state below it takes a word; where several begin
constexpr uint32_t kRansAlone = 1021;            // where one begins that is alone
constexpr int kRansLanes = 4;
constexpr int64_t kRansMany = 1 << 15;           // symbols from which on there is more than one state
constexpr int64_t kRansMost = int64_t{1} << 40;  // symbols, so that no size overflows

// Symbols uint8 [batch][channels][inner], each below 2^bits, one after the other.
struct RansFormat {
  int bits;
  int64_t batch, channels, inner;

  bool valid() const;
  int64_t elements() const { return batch * channels * inner; }
  int lanes() const { return elements() < kRansMany ? 1 : kRansLanes; }
  int64_t most_bytes() const { return 2 * elements() + 4 * lanes(); }  // that coded symbols can take
};

// Who fills it answers for it: every frequency is at least 1, and they add up.
struct RansTables {
  const uint16_t* of;       // [channels]: the table of each
  const uint32_t* symbols;  // [tables][2^bits]: frequency | start << 16
  const uint8_t* slots;     // [tables][2^14]: whose interval that is; only decoding needs it
};

// Codes `symbols` into the last bytes that end at `end`, of which there are most_bytes(); how many it took, or -1 where
// a symbol is too large.
int64_t rans_encode(const RansFormat& format, const RansTables& tables, const uint8_t* symbols, uint8_t* end);

// The symbols of these bytes; false if an encoder would not have made them. Reads nothing beyond, whatever they are.
bool rans_decode(const RansFormat& format, const RansTables& tables, const uint8_t* data, int64_t size, uint8_t* symbols);

}  // namespace shoal
