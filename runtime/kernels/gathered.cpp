// What of the gathered layouts needs no path of its own: panels of them, and a row's codes and channels.
#include "gathered.h"

#include <algorithm>
#include <cstring>

#include "spread.h"

namespace shoal {
namespace {

typedef uint32_t Four __attribute__((vector_size(16), may_alias));

// Words {a0, b0, a1, b1} and {a2, b2, a3, b3}, and by pairs of words.
#if defined(__clang__)
Four low(Four a, Four b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
Four high(Four a, Four b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
Four low_pairs(Four a, Four b) { return __builtin_shufflevector(a, b, 0, 1, 4, 5); }
Four high_pairs(Four a, Four b) { return __builtin_shufflevector(a, b, 2, 3, 6, 7); }
#else
Four low(Four a, Four b) { return __builtin_shuffle(a, b, Four{0, 4, 1, 5}); }
Four high(Four a, Four b) { return __builtin_shuffle(a, b, Four{2, 6, 3, 7}); }
Four low_pairs(Four a, Four b) { return __builtin_shuffle(a, b, Four{0, 1, 4, 5}); }
Four high_pairs(Four a, Four b) { return __builtin_shuffle(a, b, Four{2, 3, 6, 7}); }
#endif

// One block of inputs of all panels: their channels lie behind each other.
template <int Bits>
void down_block(const LinearFormat& f, const uint8_t* matrix, int64_t block, uint8_t* to) {
  constexpr int kPlanes = 8 / Bits, kPanels = 4 * kPlanes;
  constexpr uint32_t kMask = ((1 << Bits) - 1) * 0x01010101u, kBytes = 0x00ff00ff, kHalf = 0x0000ffff;
  const GatheredDown layout(f);
  const int64_t all = lines(f), panels = f.panels(), bytes = f.panel_bytes(), inputs = f.inputs, stride = layout.channel;
  const uint8_t* codes = matrix + layout.codes_at;
  uint8_t* words = to + f.codes_at() + block * f.block_bytes();
  for (int64_t k = block * kBlock; k < (block + 1) * kBlock; k += 4 * kPlanes, words += 64)
    for (int64_t at = 0; at < all * kLine; at += sizeof(Four)) {
      Four out[kPanels] = {};
      for (int quad = 0; quad < kPlanes; ++quad) {
        const int64_t from = k + 4 * quad;
        Four v[4] = {};
        for (int c = 0; c < 4 && from + c < inputs; ++c) std::memcpy(&v[c], codes + (from + c) * stride + at, sizeof v[c]);
        const Four even[] = {(v[0] & kHalf) | v[2] << 16u, v[0] >> 16u | (v[2] & ~kHalf)};
        const Four odd[] = {(v[1] & kHalf) | v[3] << 16u, v[1] >> 16u | (v[3] & ~kHalf)};
        for (int byte = 0; byte < 4; ++byte) {
          const Four some = byte % 2 ? (even[byte / 2] >> 8u & kBytes) | (odd[byte / 2] & ~kBytes)
                                     : (even[byte / 2] & kBytes) | (odd[byte / 2] & kBytes) << 8u;
          for (int plane = 0; plane < kPlanes; ++plane)
            out[byte * kPlanes + plane] |= (some >> static_cast<uint32_t>(plane * Bits) & kMask) << static_cast<uint32_t>(quad * Bits);
        }
      }
      const int64_t first = at / kLine * kPanels, count = std::min<int64_t>(kPanels, panels - first);
      for (int64_t p = 0; p < count; ++p) std::memcpy(words + (first + p) * bytes + at % kLine, &out[p], sizeof out[p]);
    }
}

}  // namespace

void up_panel(const LinearFormat& f, const uint8_t* panel, uint8_t* to) {
  want_rows(f, panel, 0xffff);
  const int64_t spans = f.spans(), groups = f.groups(), words = f.padded() * f.bits / 32;
  for (int64_t r = 0; r < kPanel; ++r) {
    for (int64_t span = 0; span < spans; ++span) std::memcpy(to + (span * kPanel + r) * 4, panel + (r * spans + span) * 4, 4);
    const uint8_t* row = row_at(f, panel, r);
    for (int64_t group = 0; group < groups; ++group) to[f.groups_at() + group * kPanel + r] = row[group];
  }
  // A row's words are a multiple of four
  uint8_t* codes = to + f.codes_at();
  const uint8_t* rows = row_at(f, panel, 0) + row_codes(f);
  const int64_t stride = row_at(f, panel, 1) - row_at(f, panel, 0);
  for (int64_t w = 0; w < words; w += 4)
    for (int64_t r = 0; r < kPanel; r += 4) {
      Four v[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&v[i], rows + (r + i) * stride + 4 * w, sizeof v[i]);
      const Four a = low(v[0], v[1]), b = low(v[2], v[3]), c = high(v[0], v[1]), d = high(v[2], v[3]);
      const Four out[] = {low_pairs(a, b), high_pairs(a, b), low_pairs(c, d), high_pairs(c, d)};
      for (int i = 0; i < 4; ++i) std::memcpy(codes + ((w + i) * kPanel + r) * 4, &out[i], sizeof out[i]);
    }
}

void down_panels(const LinearFormat& f, const uint8_t* matrix, uint8_t* to, const Parallel& parallel) {
  const GatheredDown layout(f);
  for (int64_t p = 0; p < f.panels(); ++p) {
    uint8_t* panel = to + p * f.panel_bytes();
    for (int64_t span = 0; span < f.spans(); ++span)
      std::memcpy(panel + span * kPanel * 4, matrix + (span * layout.outputs + p * kPanel) * 4, kPanel * 4);
    for (int64_t group = 0; group < f.groups(); ++group)
      std::memcpy(panel + f.groups_at() + group * kPanel, matrix + layout.groups_at + group * layout.outputs + p * kPanel, kPanel);
  }
  parallel(f.blocks(), [&](int64_t block) {
    (f.bits == 2 ? down_block<2> : f.bits == 4 ? down_block<4> : down_block<8>)(f, matrix, block, to);
  });
}

bool gathered_gate_up(const LinearPath& path, const LinearFormat& f, const LinearCall& call, const Parallel& parallel) {
  const Quantized quantized(f, call.rows);
  if (!quantized || !quantize_rows(path, f, call, quantized.a, parallel)) return false;
  const int64_t bytes = f.panel_bytes();
  // Panels in turn: even ones are the gate's
  auto panel = [&](int64_t index, uint8_t* room) {
    if (index % 2 == 0) return call.weights + index / 2 * bytes;
    up_panel(f, up_at(f, call.weights, index / 2), room);
    return static_cast<const uint8_t*>(room);
  };
  if (call.rows >= kTile)
    return many(path, f, call, quantized.a, parallel, 64, bytes, [&](int64_t index, uint8_t* room, int8_t* weights) {
      const uint8_t* found = panel(index, room);
      path.expand(f, found, weights);
      return found;
    });
  bool enough = true;
  few(path, f, call, quantized.a, parallel, kPieceBytes / bytes, [&](int64_t first, int64_t, auto&& use) {
    Scratch scratch(static_cast<size_t>(bytes));
    if (!scratch) return __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
    const uint8_t* const found[] = {panel(first, nullptr), panel(first + 1, scratch.take<uint8_t>(bytes))};
    use(found);
  });
  return enough;
}

bool gathered_down(const LinearPath& path, const LinearFormat& f, const LinearCall& call, const Parallel& parallel) {
  Scratch scratch(static_cast<size_t>(f.bytes()));
  if (!scratch) return false;
  LinearCall rebuilt = call;
  auto panels = scratch.take<uint8_t>(f.bytes());
  down_panels(f, call.weights, panels, parallel);
  rebuilt.weights = panels;
  return linear(path, f, rebuilt, parallel);
}

void deal(const LinearFormat& f, const Activations& a, int64_t row, uint32_t* to) {
  const int64_t of_block = 2 * f.bits, planes = 8 / f.bits, words = f.blocks() * of_block;
  for (int64_t block = 0; block < f.blocks(); ++block) {
    const int8_t* codes = a.block(row, block, f.blocks());
    for (int64_t j = 0; j < of_block; ++j)
      for (int64_t plane = 0; plane < planes; ++plane)
        std::memcpy(to + plane * words + block * of_block + j, codes + 4 * (j * planes + plane), 4);
  }
}

int64_t channels(const LinearFormat& f, const Activations& a, int64_t row, int32_t* to) {
  int64_t count = 0;
  for (int64_t k = 0; k < f.inputs; ++k)
    if (a.block(row, k / kBlock, f.blocks())[k % kBlock]) to[count++] = static_cast<int32_t>(k);
  return count;
}

}  // namespace shoal
