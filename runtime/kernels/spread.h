// How products are spread over threads. Of a few rows each panel is read once; of many rows some panels at a time
// become a thread's own weights in its scratch, and each tile of the activations meets all of them while they are in
// the caches.
#pragma once
#include <algorithm>
#include <cstdint>

#include "linear.h"
#include "scratch.h"

namespace shoal {

constexpr int64_t kPieceBytes = 32 << 10;  // of weights: a few microseconds of a core's share of memory speed

// Room for `rows` rows of quantised activations.
struct Quantized {
  Scratch scratch;
  Activations a{};

  Quantized(const LinearFormat& f, int64_t rows) : scratch(bytes(f, rows)) {
    if (!scratch) return;
    a.rows = rows;
    a.tile = std::min<int64_t>(rows, kTile);
    a.codes = scratch.take<int8_t>(in_tiles(rows) * f.padded());
    a.scales = scratch.take<float>(rows * f.spans());
    a.sums = scratch.take<int32_t>(rows * f.groups());
    a.totals = scratch.take<int32_t>(rows * f.spans());
  }
  explicit operator bool() const { return static_cast<bool>(scratch); }

 private:
  static int64_t in_tiles(int64_t rows) {
    const int64_t tile = std::min<int64_t>(rows, kTile);
    return (rows + tile - 1) / tile * tile;
  }
  static size_t bytes(const LinearFormat& f, int64_t rows) {
    auto room = [](int64_t count, size_t size) { return Scratch::round_up(static_cast<size_t>(count) * size); };
    return room(in_tiles(rows) * f.padded(), 1) + 2 * room(rows * f.spans(), 4) + room(rows * f.groups(), 4);
  }
};

// Quantises all rows of the call; false where memory ran out.
inline bool quantize_rows(const LinearPath& path, const LinearFormat& f, const LinearCall& call, const Activations& a,
                          const Parallel& parallel) {
  bool enough = true;
  auto quantize = [&](int64_t first, int64_t last) {
    Scratch prepared(static_cast<size_t>(f.inputs) * sizeof(float));
    float* values = prepared.take<float>(f.inputs);
    if (!prepared) return __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
    for (int64_t row = first; row < last; ++row) {
      const float* x = call.x + row * f.inputs;
      const bool as_is = !call.norm && !f.rotated;
      if (!as_is) path.prepare(f, x, call.norm, call.epsilon, values);
      path.quantize(f, as_is ? x : values, a, row);
    }
  };
  if (call.rows <= kFew) {  // cheaper than waking a thread
    quantize(0, call.rows);
  } else {
    parallel((call.rows + 7) / 8, [&](int64_t item) { quantize(item * 8, std::min((item + 1) * 8, call.rows)); });
  }
  return enough;
}

// The product of a few rows, each panel read once. panels(first, count, use) calls use(panels) with pointers to one
// panel or two. A thread takes `step` panels at a time.
template <class Panels>
void few(const LinearPath& path, const LinearFormat& f, const LinearCall& call, const Activations& a,
         const Parallel& parallel, int64_t step, Panels&& panels) {
  const int64_t unit = call.activation == Activation::none ? 1 : 2;
  in_runs(parallel, f.panels() / unit, std::max<int64_t>(1, step / unit), [&](int64_t from, int64_t to) {
    alignas(64) float sums[kFew * 2 * kPanel];
    for (int64_t at = from; at < to; ++at)
      panels(at * unit, unit, [&](const uint8_t* const* of) {
        for (int64_t first = 0; first < call.rows; first += kFew) {
          const int64_t rows = std::min<int64_t>(kFew, call.rows - first);
          for (int64_t p = 0; p < unit; ++p) path.dot(f, of[p], a, first, rows, sums + p * kPanel, 2 * kPanel);
          path.finish(f, call, sums, 2 * kPanel, first, rows, at * unit, unit);
        }
      });
  });
}

// The product of 16 rows or more. panel(index, room, weights) expands one panel to `weights` and returns its header; it
// may keep that in `room`, `room_bytes` of scratch for each panel. An item has at least `item_rows` rows, as what it
// costs to expand its panels is paid anew by each.
template <class Panel>
bool many(const LinearPath& path, const LinearFormat& f, const LinearCall& call, const Activations& a,
          const Parallel& parallel, int64_t item_rows, int64_t room_bytes, Panel&& panel) {
  constexpr int64_t kItems = 8;            // a thread, so that one that started late or slowly does less
  constexpr size_t kExpanded = 512 << 10;  // bytes of panels: about half of a core's second cache
  const size_t expanded = static_cast<size_t>(f.padded() * kPanel);
  const int64_t most = 4 * expanded <= kExpanded ? 4 : 2, items = (f.panels() + most - 1) / most;
  const int64_t wanted = (kItems * parallel.threads + items - 1) / items;  // parts of the rows
  int64_t step = std::max(item_rows, (call.rows + wanted - 1) / wanted);
  step = (step + kRows - 1) / kRows * kRows;
  const int64_t parts = (call.rows + step - 1) / step;
  bool enough = true;
  parallel(items * parts, [&](int64_t item) {
    Scratch scratch(static_cast<size_t>(most) * (expanded + Scratch::round_up(static_cast<size_t>(room_bytes))));
    if (!scratch) return __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
    int8_t* weights = scratch.take<int8_t>(most * f.padded() * kPanel);
    const int64_t begin = item / parts * most, end = std::min(begin + most, f.panels());
    const uint8_t* headers[4];
    for (int64_t p = 0; p < end - begin; ++p)
      headers[p] = panel(begin + p, scratch.take<uint8_t>(room_bytes), weights + static_cast<size_t>(p) * expanded);
    alignas(64) float sums[kRows * 2 * kPanel];
    const int64_t last = std::min(call.rows, (item % parts + 1) * step);
    for (int64_t first = item % parts * step; first < last; first += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, last - first);
      for (int64_t p = 0; p < end - begin; p += 2) {
        const int64_t panels = std::min<int64_t>(2, end - begin - p);
        const int8_t* of = weights + static_cast<size_t>(p) * expanded;
        path.tile(f, of, headers + p, static_cast<int>(panels), a, first, rows, sums, 2 * kPanel);
        path.finish(f, call, sums, 2 * kPanel, first, rows, begin + p, panels);
      }
    }
  });
  return enough;
}

}  // namespace shoal
