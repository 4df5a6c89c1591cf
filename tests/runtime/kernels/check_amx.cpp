// What check_linear cannot see of AMX. First its instructions, the processor's or amx_emulator.cpp's, against a plain
// model: so what holds under the emulator holds on the processor. Then `tile` of the amx path among other users of the
// tiles: shapes that they leave behind, none at all, many threads, and what must not be written.
//
//   check_amx [seed [rounds]]      exits with 1 at the first difference, with 77 where there is no AMX
//   check_amx time                 on a processor that has it: how fast `expand` and `tile` are
#include <immintrin.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <initializer_list>
#include <random>
#include <thread>
#include <vector>

#include "isa.h"
#include "linear.h"

using namespace shoal;

namespace {

thread_local std::mt19937 engine;

int below(int count) { return static_cast<int>(engine() % static_cast<unsigned>(count)); }

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::exit(1);
}

struct alignas(64) Shape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void load(const Shape& shape) { asm volatile("ldtilecfg %0" ::"m"(shape)); }
Shape loaded() {
  Shape shape;
  asm volatile("sttilecfg %0" : "=m"(shape));
  return shape;
}
bool same(const Shape& a, const Shape& b) { return !std::memcmp(&a, &b, sizeof a); }

// Instructions against the model ------------------------------------------------------------------------------------

using Bytes = std::vector<uint8_t>;

Bytes random_bytes(int count) {
  Bytes bytes(static_cast<size_t>(count));
  for (auto& byte : bytes) byte = static_cast<uint8_t>(below(8) ? below(256) : below(2) ? 128 : 255);
  return bytes;
}

int element(uint8_t byte, bool is_signed) { return is_signed ? static_cast<int8_t>(byte) : byte; }

void check_products() {
  const int rows = 1 + below(16), columns = 1 + below(16), depth = 1 + below(16);
  const int stride = 64 + below(40);
  Shape shape;
  shape.rows[1] = shape.rows[2] = static_cast<uint8_t>(rows);
  shape.row_bytes[1] = shape.row_bytes[3] = static_cast<uint16_t>(4 * columns);
  shape.row_bytes[2] = static_cast<uint16_t>(4 * depth);
  shape.rows[3] = static_cast<uint8_t>(depth);
  load(shape);
  expect(same(loaded(), shape), "sttilecfg gives what ldtilecfg was given");
  const Bytes a = random_bytes(16 * stride), b = random_bytes(16 * stride), c = random_bytes(16 * stride);
  for (int kind = 0; kind < 4; ++kind) {
    Bytes got = random_bytes(16 * stride), wanted = got;
    _tile_loadd(1, c.data(), stride);
    _tile_loadd(2, a.data() + (rows - 1) * stride, -stride);  // the last row first
    _tile_stream_loadd(3, b.data(), stride);
    if (kind == 0) _tile_dpbssd(1, 2, 3);
    if (kind == 1) _tile_dpbsud(1, 2, 3);
    if (kind == 2) _tile_dpbusd(1, 2, 3);
    if (kind == 3) _tile_dpbuud(1, 2, 3);
    _tile_stored(1, got.data(), stride);
    for (int row = 0; row < rows; ++row)
      for (int n = 0; n < columns; ++n) {
        uint32_t sum;
        std::memcpy(&sum, &c[static_cast<size_t>(row * stride + 4 * n)], 4);
        for (int k = 0; k < 4 * depth; ++k)
          sum += static_cast<uint32_t>(
              element(a[static_cast<size_t>((rows - 1 - row) * stride + k)], kind < 2) *
              element(b[static_cast<size_t>(k / 4 * stride + 4 * n + k % 4)], kind % 2 == 0));
        std::memcpy(&wanted[static_cast<size_t>(row * stride + 4 * n)], &sum, 4);
      }
    expect(got == wanted, "a product of tiles");
  }
}

// Each way to name memory loads the same tile.
void check_addresses() {
  Shape shape;
  shape.rows[5] = 3;
  shape.row_bytes[5] = 8;
  load(shape);
  alignas(64) static uint64_t memory[64];
  for (auto& word : memory) word = engine();
  auto holds = [&](int from, int step, const char* what) {
    uint64_t tile[3];
    _tile_stored(5, tile, 8);
    for (int row = 0; row < 3; ++row) expect(tile[row] == memory[from + row * step], what);
    _tile_zero(5);
  };
  asm volatile("tileloadd (%0), %%tmm5" ::"r"(memory + 7) : "memory");
  holds(7, 0, "a load without a stride");
  asm volatile("tileloadd 16(%0,%1,2), %%tmm5" ::"r"(memory), "r"(8L) : "memory");
  holds(2, 2, "a load with a short displacement");
  const auto beyond = reinterpret_cast<uintptr_t>(memory + 1) + 4096;
  asm volatile("tileloadd -4096(%0,%1,8), %%tmm5" ::"r"(beyond), "r"(1L) : "memory");
  holds(1, 1, "a load with a long displacement");
  asm volatile("movq %0, %%r13; tileloadd (%%r13,%1,4), %%tmm5" ::"r"(memory + 3), "r"(2L) : "memory", "r13");
  holds(3, 1, "a load from r13");
  asm volatile("movq %0, %%r12; movq %1, %%r9; tileloadd (%%r12,%%r9,1), %%tmm5" ::"r"(memory + 4), "r"(24L)
               : "memory", "r9", "r12");
  holds(4, 3, "a load from r12 by r9");
  // The stack pointer as the base: aside while it points to what is loaded, as a handler needs a stack above it
  alignas(64) uint64_t on_stack[1024];
  std::memcpy(on_stack + 960, memory, sizeof memory);
  asm volatile("movq %%rsp, %%r14; movq %0, %%rsp; tileloadd 8(%%rsp,%1,1), %%tmm5; movq %%r14, %%rsp"
               ::"r"(on_stack + 960), "r"(8L)
               : "memory", "r14");
  holds(1, 1, "a load from rsp");
  _tile_release();
  Shape none;
  none.palette = 0;
  expect(same(loaded(), none), "nothing is configured after a release");
}

// That `work` ends its process, as it asks for what the processor refuses.
template <class Work>
void expect_death(const char* what, Work&& work) {
  const pid_t child = fork();
  if (!child) {
    std::freopen("/dev/null", "w", stderr);
    work();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(!(WIFEXITED(status) && WEXITSTATUS(status) == 0), what);
}

void check_refusals() {
  Shape good;
  good.rows[0] = good.rows[1] = good.rows[2] = 4;
  good.row_bytes[0] = good.row_bytes[1] = good.row_bytes[2] = 16;
  auto with = [&](auto change) {
    Shape shape = good;
    change(shape);
    return shape;
  };
  auto product = [](const Shape& shape) {
    load(shape);
    _tile_dpbssd(0, 1, 2);
  };
  product(good);
  expect_death("palette 2", [&] { load(with([](Shape& s) { s.palette = 2; })); });
  expect_death("a row of 65 bytes", [&] { load(with([](Shape& s) { s.row_bytes[0] = 65; })); });
  expect_death("17 rows", [&] { load(with([](Shape& s) { s.rows[0] = 17; })); });
  expect_death("rows without bytes", [&] { load(with([](Shape& s) { s.row_bytes[3] = 4; })); });
  expect_death("a ninth tile", [&] { load(with([](Shape& s) { s.rows[8] = 1, s.row_bytes[8] = 4; })); });
  expect_death("reserved bytes", [&] { load(with([](Shape& s) { s.reserved[13] = 1; })); });
  expect_death("rows that do not fit", [&] { product(with([](Shape& s) { s.rows[1] = 3; })); });
  expect_death("inputs that do not fit", [&] { product(with([](Shape& s) { s.rows[2] = 3; })); });
  expect_death("outputs that do not fit", [&] { product(with([](Shape& s) { s.row_bytes[2] = 12; })); });
  expect_death("rows of no whole quads", [&] { product(with([](Shape& s) { s.row_bytes[1] = 15; })); });
  expect_death("a tile without rows", [&] {
    load(good);
    _tile_zero(7);
  });
  expect_death("nothing configured", [&] {
    _tile_release();
    _tile_zero(0);
  });
}

// `tile` among others -----------------------------------------------------------------------------------------------

// What another library, or nobody, may have left.
void leave_something() {
  Shape shape;
  switch (below(4)) {
    case 0: return _tile_release();
    case 1: return;
    case 2:
      for (int tile = 0; tile < 8; ++tile) shape.rows[tile] = 16, shape.row_bytes[tile] = 64;
      if (below(2)) {
        shape.rows[below(8)] = static_cast<uint8_t>(1 + below(16));
      } else {
        shape.row_bytes[below(8)] = static_cast<uint16_t>(1 + below(64));
      }
      return load(shape);
    default:
      for (int tile = 0; tile < 1 + below(8); ++tile) {
        shape.rows[tile] = static_cast<uint8_t>(1 + below(16));
        shape.row_bytes[tile] = static_cast<uint16_t>(1 + below(64));
      }
      return load(shape);
  }
}

template <class T>
T* aligned(std::vector<T>& memory, int64_t count) {  // with random content
  memory.resize(static_cast<size_t>(count) + 64 / sizeof(T));
  auto bytes = reinterpret_cast<uint8_t*>(memory.data());
  for (size_t i = 0; i < memory.size() * sizeof(T); ++i) bytes[i] = static_cast<uint8_t>(engine());
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes) + 63) / 64 * 64);
}

void check_tile(const LinearPath& path) {
  LinearFormat f{};
  f.inputs = 1 + below(700);
  f.outputs = 2 * kPanel;
  constexpr int widths[] = {2, 3, 4, 8};
  f.bits = widths[below(4)];
  f.span = below(3) ? std::min<int64_t>(64 << below(3), f.padded()) : f.padded();
  f.group = f.bits == 8 || below(2) ? f.span : 32;
  expect(f.valid(), "a format of this test is valid");

  std::vector<uint8_t> packed_memory;
  uint8_t* packed = aligned(packed_memory, f.bytes());
  const uint8_t* headers[kPair] = {packed, packed + f.panel_bytes()};
  for (auto header : headers)
    for (int64_t i = 0; i < f.spans() * kPanel; ++i)
      reinterpret_cast<float*>(const_cast<uint8_t*>(header))[i] = static_cast<float>(below(2001) - 1000) * 1e-5f;
  std::vector<int8_t> weight_memory, wanted_memory;
  const int64_t panel_weights = f.padded() * kPanel;
  int8_t* weights = aligned(weight_memory, kPair * panel_weights);
  int8_t* wanted_weights = aligned(wanted_memory, kPair * panel_weights);
  for (int p = 0; p < kPair; ++p) {
    path.expand(f, headers[p], weights + p * panel_weights);
    linear_scalar().expand(f, headers[p], wanted_weights + p * panel_weights);
  }
  expect(!std::memcmp(weights, wanted_weights, static_cast<size_t>(kPair * panel_weights)),
         "expand gives the signed weights");

  const int64_t first = kRows * below(2), count = 1 + below(3 * kRows), rows = first + count;
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums, totals;
  Activations a{rows, kTile, nullptr, nullptr, nullptr, nullptr};
  a.codes = aligned(codes, (rows + kTile - 1) / kTile * kTile * f.padded());
  a.scales = aligned(scales, rows * f.spans());
  a.sums = aligned(sums, rows * f.groups());
  a.totals = aligned(totals, rows * f.spans());
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t span = 0; span < f.spans(); ++span) {
      int32_t total = 0;
      for (int64_t k = span * f.span; k < std::min((span + 1) * f.span, f.padded()); ++k)
        total += a.block(row, k / kBlock, f.blocks())[k % kBlock];
      a.totals[row * f.spans() + span] = total;
      a.scales[row * f.spans() + span] = static_cast<float>(below(1000)) * 1e-3f;
    }
  const int panels = 1 + below(kPair);
  const int64_t ld = panels * kPanel + below(3);
  std::vector<float> out(static_cast<size_t>((count + 2) * ld), -7.5f), wanted = out;
  linear_scalar().tile(f, weights, headers, panels, a, first, count, wanted.data() + 1, ld);
  leave_something();
  path.tile(f, weights, headers, panels, a, first, count, out.data() + 1, ld);
  expect(!std::memcmp(out.data(), wanted.data(), out.size() * sizeof(float)),
         "tile gives the scalar path's bits and writes nothing else");
}

// Time --------------------------------------------------------------------------------------------------------------

template <class Work>
double seconds(Work&& work) {  // the best of many
  double best = 1;
  for (int i = 0; i < 50; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

// Two panels over 512 rows, as `linear` does it: in calls of 32 rows or more, with the tiles kept or released.
void time_path(const LinearPath& path, int64_t inputs, int64_t span, int bits) {
  const LinearFormat f{inputs, 2 * kPanel, bits, bits == 8 ? span : 32, span, 0};
  expect(f.valid(), "a format of this test is valid");
  constexpr int64_t rows = 512;
  std::vector<uint8_t> packed;
  std::vector<int8_t> weights, codes;
  std::vector<float> scales, out(rows * kPair * kPanel);
  std::vector<int32_t> totals;
  const uint8_t* first = aligned(packed, f.bytes());
  const uint8_t* headers[kPair] = {first, first + f.panel_bytes()};
  int8_t* expanded = aligned(weights, kPair * f.padded() * kPanel);
  Activations a{rows, kTile, nullptr, nullptr, nullptr, nullptr};
  a.codes = aligned(codes, rows * f.padded());
  a.scales = aligned(scales, rows * f.spans());
  a.totals = aligned(totals, rows * f.spans());
  std::fill_n(a.scales, rows * f.spans(), 1.0f);
  for (auto header : headers)
    std::fill_n(reinterpret_cast<float*>(const_cast<uint8_t*>(header)), f.spans() * kPanel, 1.0f);
  std::printf("%5d inputs, span %5d, %d bits: expand %5.1f ns a block; GMAC/s", static_cast<int>(inputs),
              static_cast<int>(span), bits,
              1e9 / static_cast<double>(f.blocks()) * seconds([&] { path.expand(f, headers[0], expanded); }));
  for (bool release : {false, true})
    for (int64_t step : {32, 64, 128, 512}) {
      const double time = seconds([&] {
        for (int64_t row = 0; row < rows; row += step) {
          path.tile(f, expanded, headers, kPair, a, row, step, out.data() + row * kPair * kPanel, kPair * kPanel);
          if (release) _tile_release();
        }
      });
      const auto products = static_cast<double>(rows * kPair * kPanel * f.padded());
      std::printf(" %5.0f%s", 1e-9 * products / time, release ? "r" : "");
    }
  std::puts("");
}

}  // namespace

int main(int argc, char** argv) {
  const LinearPath* path = linear_path("amx");
  if (!path) {
    std::puts("no AMX");
    return 77;
  }
  if (argc > 1 && !std::strcmp(argv[1], "time")) {
    std::puts("in calls of 32, 64, 128 and 512 rows; r: the tiles are released after each");
    for (int64_t inputs : {896, 2048, 4864})
      for (int64_t span : {int64_t{128}, int64_t{256}, inputs}) time_path(*path, inputs, span, 4);
    time_path(*path, 896, 896, 8);
    return 0;
  }
  const unsigned seed = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : std::random_device{}();
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 100;
  std::printf("seed %u, %d rounds\n", seed, rounds);
  std::fflush(stdout);
  engine.seed(seed);
  for (int round = 0; round < rounds; ++round) check_products();
  check_addresses();
  check_refusals();
  for (int round = 0; round < rounds; ++round) check_tile(*path);
  std::vector<std::thread> threads;
  for (unsigned i = 1; i <= 4; ++i)
    threads.emplace_back([=] {
      engine.seed(seed + i);
      for (int round = 0; round < rounds / 4; ++round) check_products(), check_tile(*path);
    });
  for (auto& thread : threads) thread.join();
  std::puts("all as it should be");
}
