// One product of a BitStack, spread over threads: a few rows meet the signs of one block after another, in runs of
// panels that are long enough to be fetched ahead; many rows rebuild panels and go on as 8-bit weights do (spread.h).
#include "stack.h"

#include <algorithm>
#include <cstring>

#include "spread.h"
#include "stack_path.h"

namespace shoal {
namespace {

constexpr int64_t kRunBytes = 128 << 10;   // of a block's signs: what fetches ahead begins anew with each run
constexpr int64_t kMostPanels = 128;       // of a run, and of its sums, which stay in the first cache, for all rows:
constexpr int64_t kMostSums = 480 * kPanel;
constexpr int64_t kAlone = 8 << 10;        // values to weigh that are cheaper than waking a thread
constexpr int64_t kItemRows = 256;         // at least: rebuilding a panel of six blocks costs as much as forty rows

// z of all blocks, ready for the signs; a block's rows together.
struct Weighed {
  Scratch scratch;
  int8_t* codes = nullptr;
  float* scales = nullptr;
  int32_t* totals = nullptr;
  uint8_t* tables = nullptr;
  int64_t of_block, table;  // rows; bytes of a row's tables

  Weighed(const StackPath& path, const StackFormat& f, int64_t blocks, int64_t rows)
      : scratch(static_cast<size_t>(blocks * rows * f.rank) *
                    static_cast<size_t>(f.padded() * (1 + path.table) + 8) + 128),
        of_block(rows * f.rank),
        table(f.padded() * path.table) {
    if (!scratch) return;
    codes = scratch.take<int8_t>(blocks * of_block * f.padded());
    scales = scratch.take<float>(blocks * of_block);
    totals = scratch.take<int32_t>(blocks * of_block);
    tables = scratch.take<uint8_t>(blocks * of_block * table);
  }
  StackRows rows(const StackFormat& f, int64_t block, int64_t count) const {
    const int64_t at = block * of_block;
    return {count, codes + at * f.padded(), scales + at, totals + at, tables + at * table};
  }
};

// Rows as the blocks and the base take them. False where memory ran out.
bool quantize(const LinearPath& path, const StackPath& stack, const StackFormat& f, const StackWeights& w,
              const LinearCall& call, const Activations& base, const Weighed& to, const Parallel& parallel) {
  const LinearFormat whole{f.inputs, f.outputs, 8, f.padded(), f.padded(), f.rotated};
  const bool as_is = !call.norm && !f.rotated;
  Scratch scratch(as_is ? 1 : static_cast<size_t>(call.rows * f.inputs) * sizeof(float));
  if (!scratch) return false;
  float* prepared = scratch.take<float>(as_is ? 0 : call.rows * f.inputs);
  auto prepare = [&](int64_t row) {
    path.prepare(whole, call.x + row * f.inputs, call.norm, call.epsilon, prepared + row * f.inputs);
  };
  bool enough = true;
  auto weigh = [&](int64_t item) {
    const int64_t row = item / (w.count + 1), block = item % (w.count + 1) - 1;
    const float* x = as_is ? call.x + row * f.inputs : prepared + row * f.inputs;
    if (block < 0) {
      if (w.base) path.quantize(*w.base_format, x, base, row);
      return;
    }
    Scratch room(static_cast<size_t>(f.inputs) * sizeof(float));
    if (!room) return __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
    float* z = room.take<float>(f.inputs);
    for (int64_t r = 0; r < f.rank; ++r) {
      stack.weigh(reinterpret_cast<const uint16_t*>(w.blocks[block]) + r * f.padded(), x, f.inputs, z);
      const int64_t at = block * to.of_block + row * f.rank + r;
      int32_t total;
      path.quantize(whole, z, {1, 1, to.codes + at * f.padded(), to.scales + at, &total, to.totals + at}, 0);
      if (to.table) stack.tabulate(to.codes + at * f.padded(), f.padded(), to.tables + at * to.table);
    }
  };
  const int64_t items = call.rows * (w.count + 1);
  if (call.rows * w.count * f.rank * f.inputs <= kAlone) {
    for (int64_t row = 0; row < call.rows && !as_is; ++row) prepare(row);
    for (int64_t item = 0; item < items; ++item) weigh(item);
  } else {
    if (!as_is) parallel(call.rows, prepare);
    parallel(items, weigh);
  }
  return enough;
}

void from_signs(const LinearPath& path, const StackPath& stack, const StackFormat& f, const StackWeights& w,
         const LinearCall& call, const Activations& base, const Weighed& weighed, const Parallel& parallel) {
  const int64_t unit = call.activation == Activation::none ? 1 : 2, units = f.panels() / unit;
  const int64_t most = std::min(kMostPanels, kMostSums / kPanel / call.rows);
  const int64_t step = std::clamp<int64_t>(kRunBytes / (f.panel_bytes() * unit), 1, most / unit);
  const int64_t ld = step * unit * kPanel;
  const LinearFormat shape = f.rebuilt();
  in_runs(parallel, units, step, [&](int64_t from, int64_t to) {
    alignas(64) float sums[kMostSums];
    const int64_t begin = from * unit, panels = (to - from) * unit;
    if (w.base) {
      for (int64_t p = 0; p < panels; ++p)
        for (int64_t first = 0; first < call.rows; first += kFew)
          path.dot(*w.base_format, w.base + (begin + p) * w.base_format->panel_bytes(), base, first,
                   std::min<int64_t>(kFew, call.rows - first), sums + first * ld + p * kPanel, ld);
    } else {
      for (int64_t row = 0; row < call.rows; ++row)
        std::memset(sums + row * ld, 0, static_cast<size_t>(panels * kPanel) * sizeof(float));
    }
    for (int block = 0; block < w.count; ++block)
      stack.add(f, w.blocks[block], begin, panels, weighed.rows(f, block, call.rows), sums, ld);
    for (int64_t p = 0; p < panels; p += unit)
      path.finish(shape, call, sums + p * kPanel, ld, 0, call.rows, begin + p, unit);
  });
}

}  // namespace

bool StackFormat::valid() const {
  auto within = [](int64_t value, int64_t most) { return value >= 1 && value <= most; };
  return within(inputs, 1 << 20) && within(outputs, 1 << 26) && within(rank, kStackRanks) &&
         !(rotated && inputs % kBlock);
}

bool stack_linear(const LinearPath& path, const StackPath& stack, const StackFormat& f, const StackWeights& w,
                  const LinearCall& call, const Parallel& parallel) {
  if (call.rows == 0) return true;
  if (w.base && !w.count) {
    LinearCall whole = call;
    whole.weights = w.base;
    return linear(path, *w.base_format, whole, parallel);
  }
  if (f.few(call.rows)) {
    const Quantized base(w.base ? *w.base_format : f.rebuilt(), call.rows);
    const Weighed weighed(stack, f, w.count, call.rows);
    if (!base || !weighed.scratch) return false;
    if (!quantize(path, stack, f, w, call, base.a, weighed, parallel)) return false;
    from_signs(path, stack, f, w, call, base.a, weighed, parallel);
    return true;
  }
  const LinearFormat rebuilt = f.rebuilt();
  const Quantized quantized(rebuilt, call.rows);
  if (!quantized || !quantize_rows(path, rebuilt, call, quantized.a, parallel)) return false;
  const int64_t panel_bytes = rebuilt.panel_bytes();
  if (call.rows < kTile) {
    bool enough = true;
    few(path, rebuilt, call, quantized.a, parallel, 1, [&](int64_t first, int64_t count, auto&& use) {
      Scratch scratch(static_cast<size_t>(2 * Scratch::round_up(panel_bytes) + f.padded() * kPanel));
      if (!scratch) return __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      int8_t* room = scratch.take<int8_t>(f.padded() * kPanel);
      uint8_t* const panels[] = {scratch.take<uint8_t>(panel_bytes), scratch.take<uint8_t>(panel_bytes)};
      for (int64_t p = 0; p < count; ++p) stack.rebuild(f, w, first + p, room, panels[p]);
      use(panels);
    });
    return enough;
  }
  return many(path, rebuilt, call, quantized.a, parallel, kItemRows, panel_bytes,
              [&](int64_t index, uint8_t* panel, int8_t* weights) {
                stack.rebuild(f, w, index, weights, panel);  // the weights' place is free until they are expanded
                path.expand(rebuilt, panel, weights);
                return panel;
              });
}

}  // namespace shoal
