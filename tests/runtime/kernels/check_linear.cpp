// Compares every path of QuantizedLinear that this machine has with the scalar path, bit by bit, and the scalar path
// with plain double precision, over random shapes; and products that leave channels out with those that do not. Every array has its exact size, so that -fsanitize=address sees
// what is read or written outside; what a path must not depend on (padding, rows beyond the last) is random.
//
//   check_linear [seed [rounds]]      exits with 1 at the first difference
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "gathered.h"
#include "isa.h"
#include "linear.h"
#include "threads.h"

using namespace shoal;

namespace {

uint64_t seed = 1;
int64_t current_round = 0;

[[noreturn]] void fail(const char* format, ...) {
  std::fprintf(stderr, "FAILED (seed %" PRIu64 ", round %" PRId64 "): ", seed, current_round);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::exit(1);
}

std::mt19937_64 engine;

int64_t below(int64_t count) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(count)); }
float normal() { return std::normal_distribution<float>()(engine); }

template <class T>
T one_of(std::initializer_list<T> choices) {
  return choices.begin()[below(static_cast<int64_t>(choices.size()))];
}

// Exactly `size` values, `offset` of them after a multiple of 64 bytes, random to begin with.
template <class T>
class Array {
 public:
  explicit Array(int64_t size, int64_t offset = 0) : size_(size) {
    const size_t bytes = static_cast<size_t>(size + offset) * sizeof(T);
    void* memory;
    if (posix_memalign(&memory, 64, bytes)) fail("no memory");
    memory_.reset(memory);
    data_ = static_cast<T*>(memory) + offset;
    for (size_t i = 0; i < bytes; ++i) static_cast<uint8_t*>(memory)[i] = static_cast<uint8_t>(engine() >> 32);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  int64_t size_;
  std::unique_ptr<void, Free> memory_;
  T* data_;
};

bool same(float a, float b) { return std::memcmp(&a, &b, 4) == 0 || (std::isnan(a) && std::isnan(b)); }
template <class T>
bool same(T a, T b) {
  return a == b;
}

template <class T>
void expect_same(const char* what, const LinearPath& path, const T* got, const T* wanted, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!same(got[i], wanted[i]))
      fail("%s: %s differs at %" PRId64 " of %" PRId64 ": %.9g, not %.9g", path.name, what, i, count,
           static_cast<double>(got[i]), static_cast<double>(wanted[i]));
}

constexpr double kTiny = 1e-30;  // what an activation far below zero may leave where it should leave nothing

void expect_near(const char* what, double got, double wanted, double tolerance) {
  if (std::isnan(wanted) ? !std::isnan(got) : !(std::fabs(got - wanted) <= tolerance))
    fail("%s is %.9g, not %.9g +- %.3g", what, got, wanted, tolerance);
}

// A matrix in the packed layout, and its integers as plain arrays.
struct Matrix {
  LinearFormat f;
  Array<uint8_t> packed;
  std::vector<int> integers;   // [outputs][inputs], zero taken off
  std::vector<float> scales;   // [outputs][spans]

  explicit Matrix(const LinearFormat& format)
      : f(format),
        packed(f.bytes()),
        integers(static_cast<size_t>(f.outputs * f.inputs)),
        scales(static_cast<size_t>(f.outputs * f.spans())) {
    for (int64_t n = 0; n < f.panels() * kPanel; ++n) {
      uint8_t* panel = packed.data() + n / kPanel * f.panel_bytes();
      const int64_t r = n % kPanel;
      const bool is_real = n < f.outputs;
      for (int64_t span = 0; span < f.spans(); ++span) {
        const float scale = is_real ? normal() * 0.01f : 0.0f;
        reinterpret_cast<float*>(panel)[span * kPanel + r] = scale;
        if (is_real) scales[static_cast<size_t>(n * f.spans() + span)] = scale;
      }
      if (!is_real) continue;  // its groups and codes stay random
      for (int64_t k = 0; k < f.inputs; ++k) {
        uint8_t& group = panel[f.groups_at() + k / f.group * kPanel + r];
        while (k % f.group == 0 && f.bits < 8 && !fits(integer(group, 0)) && !fits(integer(group, (1 << f.bits) - 1)))
          group = static_cast<uint8_t>(below(256));
        integers[static_cast<size_t>(n * f.inputs + k)] = put(panel, k, r, group);
      }
    }
  }

  double weight(int64_t n, int64_t k) const {
    return static_cast<double>(scales[static_cast<size_t>(n * f.spans() + k / f.span)]) *
           integers[static_cast<size_t>(n * f.inputs + k)];
  }

 private:
  static bool fits(int value) { return value >= -128 && value <= 127; }
  int integer(uint8_t group, int code) const { return (group & 15) * (f.step() * code - (group >> 4)); }

  // Writes a random code whose integer fits int8, as the format promises; the extremes more often than others.
  int put(uint8_t* panel, int64_t k, int64_t r, uint8_t group) {
    uint8_t* block = panel + f.codes_at() + k / kBlock * f.block_bytes();
    const int64_t at = k % kBlock, lane = 4 * r + at % 4;
    if (f.bits == 8) {
      const int code = static_cast<int>(below(4) ? below(256) - 128 : one_of({-128, 127}));
      block[at / 4 * 64 + lane] = static_cast<uint8_t>(code);
      return code - static_cast<int8_t>(group);
    }
    const int codes = 1 << f.bits;
    int code;
    do {
      code = static_cast<int>(below(4) ? below(codes) : one_of({0, codes - 1}));
    } while (!fits(integer(group, code)));
    auto store = [&](int64_t byte, int64_t shift, int mask, int bits) {
      block[byte] = static_cast<uint8_t>((block[byte] & ~(mask << shift)) | bits << shift);
    };
    if (f.bits == 4) {
      store(at / 8 * 64 + lane, at / 4 % 2 * 4, 15, code);
    } else {
      store(at / 16 * 64 + lane, at / 4 % 4 * 2, 3, code & 3);
      if (f.bits == 3) store(256 + at / 32 * 64 + lane, at / 4 % 8, 1, code >> 2);
    }
    return integer(group, code);
  }
};

// Room for `rows` rows of quantised activations.
struct Quantized {
  Array<int8_t> codes;
  Array<float> scales;
  Array<int32_t> sums, totals;
  Activations a;

  Quantized(const LinearFormat& f, int64_t rows)
      : codes((rows + tile(rows) - 1) / tile(rows) * tile(rows) * f.padded()),
        scales(rows * f.spans()),
        sums(rows * f.groups()),
        totals(rows * f.spans()),
        a{rows, tile(rows), codes.data(), scales.data(), sums.data(), totals.data()} {}

  static int64_t tile(int64_t rows) { return rows < kTile ? rows : kTile; }
};

// Rows of every kind: ordinary ones, zeros, too small, with an outlier, with ties, not finite.
void fill(const LinearFormat& f, Array<float>& x, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    float* at = x.data() + row * f.inputs;
    const int64_t kind = below(12), there = below(f.inputs);
    for (int64_t k = 0; k < f.inputs; ++k) {
      at[k] = normal();
      if (kind == 0) at[k] = 0;
      if (kind == 1) at[k] *= 1e-32f;
      if (kind == 2 && k == there) at[k] *= 1e4f;
      if (kind == 3) at[k] = k % 64 ? static_cast<float>(below(255) - 127) / 2 : 127;
      if (kind == 4 && below(20) == 0 && k == there) at[k] = one_of({INFINITY, -INFINITY, NAN});
    }
  }
}

// Rows of 64 times the Walsh-Hadamard matrix / 8: the sign of an entry is the parity of the bits its indices share.
void rotate(double* x, int64_t count) {
  for (int64_t at = 0; at < count; at += kBlock) {
    double y[kBlock] = {};
    for (int i = 0; i < kBlock; ++i)
      for (int j = 0; j < kBlock; ++j) y[i] += __builtin_parity(static_cast<unsigned>(i & j)) ? -x[at + j] : x[at + j];
    for (int i = 0; i < kBlock; ++i) x[at + i] = y[i] / 8;
  }
}

// What preparing promises of a row, in double precision.
void check_prepared(const LinearFormat& f, const float* x, const float* norm, float epsilon, const float* prepared) {
  double square = 0, most = 0;
  for (int64_t k = 0; k < f.inputs; ++k) square += double{x[k]} * x[k];
  const double factor = norm ? 1 / std::sqrt(square / static_cast<double>(f.inputs) + epsilon) : 1;
  std::vector<double> wanted(static_cast<size_t>(f.inputs));
  for (int64_t k = 0; k < f.inputs; ++k) {
    double& value = wanted[static_cast<size_t>(k)] = x[k] * factor * (norm ? norm[k] : 1.0f);
    if (!std::isfinite(value)) return;
    most = std::max(most, std::fabs(value));
  }
  if (f.rotated) rotate(wanted.data(), f.inputs);
  for (int64_t k = 0; k < f.inputs; ++k)
    expect_near("a prepared value", prepared[k], wanted[static_cast<size_t>(k)], 4e-6 * most + 1e-37);
}

// What quantising promises of row `row`, in double precision.
void check_quantized(const LinearFormat& f, const float* x, const Activations& a, int64_t row) {
  std::vector<int32_t> sums(static_cast<size_t>(f.groups()));
  for (int64_t span = 0; span < f.spans(); ++span) {
    const int64_t begin = span * f.span, end = std::min(begin + f.span, f.padded()), stop = std::min(end, f.inputs);
    auto value = [&](int64_t k) { return double{x[k]}; };
    double most = 0;
    bool finite = true;
    for (int64_t k = begin; k < stop; ++k) {
      most = std::max(most, std::fabs(value(k)));
      finite = finite && std::isfinite(value(k));
    }
    const double scale = a.scales[row * f.spans() + span];
    const bool counts = finite && most >= 1e-30f;
    expect_near("an activation scale", scale, finite ? counts ? most / 127 : 0 : NAN, most * 1e-7);
    int32_t total = 0;
    for (int64_t k = begin; k < end; ++k) {
      const int code = a.block(row, k / kBlock, f.blocks())[k % kBlock];
      if (code == -128) fail("an activation's code is -128");
      if ((k >= f.inputs || !counts) && code) fail("padding has the code %d", code);
      if (counts && k < stop) expect_near("an activation", scale * code, value(k), scale * 0.50002);
      sums[static_cast<size_t>(k / f.group)] += code;
      total += code;
    }
    if (a.totals[row * f.spans() + span] != total) fail("a span's total is wrong");
  }
  expect_same("a group's sum", linear_scalar(), a.sums + row * f.groups(), sums.data(), f.groups());
}

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::gelu: return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh: return x / (1 + std::exp(-2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case Activation::relu: return x > 0 ? x : 0;
    case Activation::none: break;
  }
  return x;
}

std::vector<const LinearPath*> paths;  // the scalar path first

// The sums [rows][panels * 16] by `dot`, or by `expand` and `tile`.
Array<float> products(const LinearPath& path, const Matrix& matrix, const Activations& a, bool tiles) {
  const LinearFormat& f = matrix.f;
  const int64_t ld = f.panels() * kPanel, panel_bytes = f.panel_bytes();
  Array<float> out(a.rows * ld, 1);
  for (int64_t panel = 0; panel < f.panels();) {
    const uint8_t* at = matrix.packed.data() + panel * panel_bytes;
    float* to = out.data() + panel * kPanel;
    if (!tiles) {
      for (int64_t row = 0, count; row < a.rows; row += count) {
        count = std::min<int64_t>(1 + below(kFew), a.rows - row);
        path.dot(f, at, a, row, count, to + row * ld, ld);
      }
      ++panel;
      continue;
    }
    const int64_t panels = std::min<int64_t>(1 + below(kPair), f.panels() - panel);
    Array<int8_t> expanded(panels * f.padded() * kPanel);
    const uint8_t* headers[kPair];
    for (int64_t p = 0; p < panels; ++p) {
      headers[p] = at + p * panel_bytes;
      path.expand(f, headers[p], expanded.data() + p * f.padded() * kPanel);
    }
    for (int64_t row = 0; row < a.rows; row += kRows)
      path.tile(f, expanded.data(), headers, static_cast<int>(panels), a, row,
                std::min<int64_t>(kRows, a.rows - row), to + row * ld, ld);
    panel += panels;
  }
  return out;
}

LinearFormat random_format(int64_t outputs_unit) {
  const auto sizes = {1,  2,   7,   15,  16,  17,  31,  33,  63,  64,  65,  97,
                      127, 128, 129, 192, 251, 256, 320, 383, 512, 640, 677, 700};
  LinearFormat f{};
  f.inputs = one_of(sizes);
  f.outputs = (one_of(sizes) + outputs_unit - 1) / outputs_unit * outputs_unit;
  f.bits = one_of({2, 3, 4, 8});
  f.span = std::min(one_of<int64_t>({64, 128, 256, f.padded()}), f.padded());
  do {
    f.group = f.bits == 8 ? f.span : one_of<int64_t>({32, 64, 128, f.span});
  } while (f.span % f.group);
  f.rotated = f.inputs % kBlock == 0 && below(2);
  if (!f.valid()) fail("a valid format was refused");
  return f;
}

void check_round() {
  const auto activation =
      below(3) ? Activation::none : one_of({Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu});
  const bool gated = activation != Activation::none;
  LinearFormat f;
  int64_t rows;
  do {
    f = random_format(gated ? 2 * kPanel : 1);
    rows = one_of({1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 70});
  } while (f.padded() * f.panels() * kPanel * rows > 1'500'000);
  const Matrix matrix(f);
  const int64_t spans = f.spans(), columns = gated ? f.outputs / 2 : f.outputs, ld = f.panels() * kPanel;

  Array<float> x(rows * f.inputs, below(4)), norm(f.inputs), bias(f.outputs, below(4)), residual(rows * f.outputs, 1);
  fill(f, x, rows);
  for (int64_t i = 0; i < f.inputs; ++i) norm[i] = normal();
  for (int64_t i = 0; i < f.outputs; ++i) bias[i] = normal();
  for (int64_t i = 0; i < residual.size(); ++i) residual[i] = normal();

  LinearCall call{};
  call.rows = rows;
  call.x = x.data();
  call.weights = matrix.packed.data();
  call.norm = below(2) ? norm.data() : nullptr;
  call.epsilon = 1e-6f;
  call.bias = !gated && below(2) ? bias.data() : nullptr;
  call.residual = !gated && below(2) ? residual.data() : nullptr;
  call.activation = activation;

  // The scalar path against double precision
  const LinearPath& scalar = linear_scalar();
  const Quantized quantized(f, rows);
  Array<float> values(rows * f.inputs);
  for (int64_t row = 0; row < rows; ++row) {
    float* prepared = values.data() + row * f.inputs;
    scalar.prepare(f, x.data() + row * f.inputs, call.norm, call.epsilon, prepared);
    check_prepared(f, x.data() + row * f.inputs, call.norm, call.epsilon, prepared);
    scalar.quantize(f, prepared, quantized.a, row);
    check_quantized(f, prepared, quantized.a, row);
  }
  const Array<float> sums = products(scalar, matrix, quantized.a, false);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < f.outputs; ++n) {
      double wanted = 0, size = 0;
      for (int64_t span = 0; span < spans; ++span) {
        double part = 0;
        for (int64_t k = span * f.span; k < std::min((span + 1) * f.span, f.inputs); ++k)
          part += matrix.weight(n, k) * quantized.a.block(row, k / kBlock, f.blocks())[k % kBlock];
        part *= quantized.scales[row * spans + span];
        wanted += part;
        size += std::fabs(part);
      }
      expect_near("a product", sums[row * ld + n], wanted, 1e-5 * size);
    }
  Array<float> wanted(rows * columns);
  {
    int threads = 1;
    LinearCall scalar_call = call;
    scalar_call.y = wanted.data();
    if (!linear(scalar, f, scalar_call, on(threads))) fail("no memory");
    auto gate_and_up = [&](int64_t row, int64_t n) {
      const float* gate = sums.data() + row * ld + n / kPanel * 2 * kPanel + n % kPanel;
      return std::pair<double, double>{activated(activation, gate[0]) * gate[kPanel],
                                       std::fabs(double{gate[0]} * gate[kPanel])};
    };
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t n = 0; n < columns; ++n) {
        const float y = wanted[row * columns + n];
        if (gated) {
          const auto [expected, size] = gate_and_up(row, n);
          expect_near("a gated product", y, expected, 1e-6 * size + kTiny);
          continue;
        }
        const double sum = sums[row * ld + n], b = call.bias ? bias[n] : 0,
                     r = call.residual ? residual[row * columns + n] : 0;
        expect_near("an output", y, sum + b + r, 3e-7 * (std::fabs(sum) + std::fabs(b) + std::fabs(r)));
      }
  }

  // Every path against the scalar one
  for (auto path : paths) {
    const Quantized mine(f, rows);
    for (int64_t row = 0; row < rows; ++row) {
      Array<float> prepared(f.inputs);
      path->prepare(f, x.data() + row * f.inputs, call.norm, call.epsilon, prepared.data());
      expect_same("a prepared row", *path, prepared.data(), values.data() + row * f.inputs, f.inputs);
      path->quantize(f, prepared.data(), mine.a, row);
      for (int64_t block = 0; block < f.blocks(); ++block)
        expect_same("a block's codes", *path, mine.a.block(row, block, f.blocks()),
                    quantized.a.block(row, block, f.blocks()), kBlock);
    }
    expect_same("scales", *path, mine.a.scales, quantized.a.scales, rows * spans);
    expect_same("sums", *path, mine.a.sums, quantized.a.sums, rows * f.groups());
    expect_same("totals", *path, mine.a.totals, quantized.a.totals, rows * spans);
    for (int tiles = 0; tiles <= (rows >= kTile); ++tiles) {
      const Array<float> out = products(*path, matrix, mine.a, tiles);
      for (int64_t row = 0; row < rows; ++row)
        expect_same(tiles ? "tile" : "dot", *path, out.data() + row * ld, sums.data() + row * ld, f.outputs);
    }
    int threads = static_cast<int>(1 + below(4));
    Array<float> y(rows * columns, below(4));
    LinearCall my_call = call;
    my_call.y = y.data();
    if (call.residual && below(2)) {
      std::memcpy(y.data(), residual.data(), static_cast<size_t>(rows * columns) * sizeof(float));
      my_call.residual = y.data();
    }
    if (!linear(*path, f, my_call, on(threads))) fail("no memory");
    expect_same("linear", *path, y.data(), wanted.data(), rows * columns);
  }

  const int64_t count = 1 + below(5);
  Array<int64_t> ids(count);
  for (int64_t i = 0; i < count; ++i) ids[i] = below(f.outputs);
  Array<float> weights(count * f.inputs, 1);
  linear_rows(f, matrix.packed.data(), ids.data(), count, 1.5f, weights.data());
  for (int64_t i = 0; i < count; ++i) {
    std::vector<double> row(static_cast<size_t>(f.inputs));
    double most = 0;
    for (int64_t k = 0; k < f.inputs; ++k) {
      row[static_cast<size_t>(k)] = matrix.weight(ids[i], k) * 1.5;
      most = std::fmax(most, std::fabs(row[static_cast<size_t>(k)]));
    }
    if (f.rotated) rotate(row.data(), f.inputs);
    for (int64_t k = 0; k < f.inputs; ++k) {
      const double weight = row[static_cast<size_t>(k)];
      expect_near("a weight of linear_rows", weights[i * f.inputs + k], weight,
                  f.rotated ? 4e-6 * most : 3e-7 * std::fabs(weight));
    }
  }
}

// The code of input k, output r of a panel as linear.h has it, unsigned.
uint32_t code_of(const LinearFormat& f, const uint8_t* panel, int64_t k, int64_t r) {
  const int64_t per_byte = 8 / f.bits, at = k % kBlock, vector = at / (4 * per_byte);
  const uint8_t byte = panel[f.codes_at() + k / kBlock * f.block_bytes() + vector * 64 + 4 * r + at % 4];
  return byte >> at / 4 % per_byte * f.bits & ((1u << f.bits) - 1);
}

// A panel as an up's that is gathered, by the words of gathered.h.
Array<uint8_t> as_gathered_up(const LinearFormat& f, const uint8_t* panel) {
  Array<uint8_t> to(f.panel_bytes());
  for (int64_t r = 0; r < kPanel; ++r) {
    for (int64_t span = 0; span < f.spans(); ++span)
      std::memcpy(to.data() + (r * f.spans() + span) * 4, panel + (span * kPanel + r) * 4, 4);
    const int64_t words = f.padded() * f.bits / 32, shared = (f.groups() + 3) / 4 * 4;
    uint8_t* row = to.data() + f.groups_at() + r * (shared + 4 * words);
    for (int64_t group = 0; group < f.groups(); ++group) row[group] = panel[f.groups_at() + group * kPanel + r];
    for (int64_t w = 0; w < words; ++w) std::memcpy(row + shared + 4 * w, panel + f.codes_at() + w * 64 + 4 * r, 4);
  }
  return to;
}

// A matrix as a down that is gathered; what pads its last line is random.
Array<uint8_t> as_gathered_down(const Matrix& matrix) {
  const LinearFormat& f = matrix.f;
  const GatheredDown layout(f);
  Array<uint8_t> to(layout.bytes);
  for (int64_t n = 0; n < f.panels() * kPanel; ++n) {
    const uint8_t* panel = matrix.packed.data() + n / kPanel * f.panel_bytes();
    const int64_t r = n % kPanel, line = n / line_outputs(f), p = n % line_outputs(f) / kPanel;
    for (int64_t span = 0; span < f.spans(); ++span)
      std::memcpy(to.data() + (span * layout.outputs + n) * 4, panel + (span * kPanel + r) * 4, 4);
    for (int64_t group = 0; group < f.groups(); ++group)
      to[layout.groups_at + group * layout.outputs + n] = panel[f.groups_at() + group * kPanel + r];
    for (int64_t k = 0; k < f.inputs; ++k) {
      uint8_t* at = to.data() + layout.codes_at + k * layout.channel + line * kLine + 4 * r;
      uint32_t word;
      std::memcpy(&word, at, 4);
      const auto shift = static_cast<uint32_t>(p * f.bits), mask = ((1u << f.bits) - 1) << shift;
      word = (word & ~mask) | code_of(f, panel, k, r) << shift;
      std::memcpy(at, &word, 4);
    }
  }
  return to;
}

// Several rows of a gathered matrix, taken as a down and as a gate and its up, have the bits that they have otherwise.
void check_gathered_rows(const Matrix& matrix, const Array<uint8_t>& down) {
  const LinearFormat& f = matrix.f;
  const int64_t rows = one_of({1, 2, 5, 16, 33}), panels = f.panels(), bytes = f.panel_bytes();
  Array<float> x(rows * f.inputs), wanted(rows * f.outputs), y(rows * f.outputs);
  fill(f, x, rows);
  LinearCall call{rows, x.data(), matrix.packed.data(), nullptr, 0, nullptr, nullptr, Activation::none, wanted.data()};
  int threads = static_cast<int>(1 + below(3));
  auto expect = [&](const uint8_t* gathered, auto&& product, int64_t count) {
    if (!linear(linear_scalar(), f, call, on(threads))) fail("no memory");
    LinearCall other = call;
    other.weights = gathered;
    other.y = y.data();
    for (auto path : paths) {
      if (!product(*path, f, other, on(threads))) fail("no memory");
      expect_same("a gathered matrix", *path, y.data(), wanted.data(), count);
    }
  };
  expect(down.data(), gathered_down, rows * f.outputs);
  if (f.outputs % (2 * kPanel)) return;
  Array<uint8_t> both(f.bytes());
  for (int64_t p = 0; p < panels; ++p) {
    const uint8_t* of = matrix.packed.data() + p * bytes;
    const Array<uint8_t> up = as_gathered_up(f, of);
    std::memcpy(both.data() + (p / 2 + p % 2 * panels / 2) * bytes, p % 2 ? up.data() : of, static_cast<size_t>(bytes));
  }
  call.activation = Activation::relu;
  expect(both.data(), gathered_gate_up, rows * f.outputs / 2);
}

// What leaves channels out has the bits of what does not: of sparse rows, of any share of zeros.
void check_gathered() {
  LinearFormat f;
  do {
    f = random_format(1);
  } while (f.bits == 3 || f.padded() * f.panels() * kPanel > 1'500'000);
  const Matrix matrix(f);
  Array<float> x(f.inputs);
  fill(f, x, 1);
  const int64_t zeros = one_of({0, 30, 50, 70, 90, 99, 100});
  for (int64_t k = 0; k < f.inputs; ++k)
    if (below(100) < zeros) x[k] = 0;
  const LinearPath& scalar = linear_scalar();
  const Quantized quantized(f, 1);
  Array<float> prepared(f.inputs);
  scalar.prepare(f, x.data(), nullptr, 0, prepared.data());
  scalar.quantize(f, prepared.data(), quantized.a, 0);
  const Array<float> wanted = products(scalar, matrix, quantized.a, false);

  // What pads a row may be anything
  const Array<uint8_t> down = as_gathered_down(matrix);
  const int64_t all = lines(f);
  Array<int32_t> active(f.inputs);
  int64_t count = channels(f, quantized.a, 0, active.data());
  for (int64_t k = 0, i = 0; k < f.inputs; ++k) {
    const bool is_there = i < count && active[i] == k;
    if (is_there) ++i;
    if (is_there != (quantized.a.block(0, k / kBlock, f.blocks())[k % kBlock] != 0)) fail("channel %d is miscounted", static_cast<int>(k));
  }
  if (below(3) == 0)
    for (count = 0; count < f.inputs; ++count) active[count] = static_cast<int32_t>(count);
  Array<int32_t> given(count);  // of its exact size
  std::memcpy(given.data(), active.data(), static_cast<size_t>(count) * 4);
  Array<uint32_t> dealt(f.padded() / 4);
  deal(f, quantized.a, 0, dealt.data());
  for (auto path : paths) {
    for (int64_t line = 0, some; line < all; line += some) {
      some = 1 + below(all - line);
      Array<int32_t> sums(some * line_outputs(f));
      Array<float> out(sums.size());
      path->columns(f, down.data(), quantized.a, given.data(), count, line, some, sums.data(), out.data());
      const int64_t n = line * line_outputs(f);
      expect_same("columns", *path, out.data(), wanted.data() + n, std::min(sums.size(), f.outputs - n));
    }
    for (int64_t p = 0; p < f.panels(); ++p) {
      const uint8_t* of = matrix.packed.data() + p * f.panel_bytes();
      const Array<uint8_t> up = as_gathered_up(f, of);
      const unsigned which = static_cast<unsigned>(one_of<int64_t>({0, 0xffff, below(1 << 16)}));
      Array<float> out(kPanel);
      const Array<float> before = [&] {
        Array<float> copy(kPanel);
        std::memcpy(copy.data(), out.data(), kPanel * sizeof(float));
        return copy;
      }();
      path->rows(f, up.data(), quantized.a, dealt.data(), which, out.data());
      for (int64_t r = 0; r < kPanel; ++r) {
        const int64_t n = p * kPanel + r;
        if (!(which >> r & 1)) expect_same("an output that was left out", *path, &out[r], &before[r], 1);
        else if (n < f.outputs) expect_same("rows", *path, &out[r], &wanted[n], 1);
      }
    }
  }

  check_gathered_rows(matrix, down);
}

}  // namespace

int main(int argc, char** argv) {
  seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  const int64_t rounds = argc > 2 ? std::atoll(argv[2]) : 100;
  std::printf("seed %" PRIu64 ", %" PRId64 " rounds, paths:", seed, rounds);
  for (auto name : {"scalar", "avx2", "avx512", "amx", "neon", "i8mm"})
    if (auto path = linear_path(name)) {
      paths.push_back(path);
      std::printf(" %s", path->name);
    }
  std::printf("; the fastest: %s\n", linear_path().name);
  std::fflush(stdout);
  engine.seed(seed);
  for (current_round = 0; current_round < rounds; ++current_round) {
    check_round();
    check_gathered();
  }
  std::printf("all the same\n");
}
