// Compares every path of StackedLinear that this machine has with the scalar path, bit by bit, and the scalar path with
// plain double precision, over random shapes. Every array has its exact size, so that -fsanitize=address sees what is
// read or written outside; what a path must not depend on (signs and codes of padding) is random.
//
//   check_stack [seed [rounds]]      exits with 1 at the first difference
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

#include "isa.h"
#include "stack_path.h"
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

template <class T>
void expect_same(const char* what, const char* path, const T* got, const T* wanted, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (std::memcmp(got + i, wanted + i, sizeof(T)) && !(got[i] != got[i] && wanted[i] != wanted[i]))
      fail("%s: %s differs at %" PRId64 " of %" PRId64 ": %.9g, not %.9g", path, what, i, count,
           static_cast<double>(got[i]), static_cast<double>(wanted[i]));
}

void expect_near(const char* what, double got, double wanted, double tolerance) {
  if (std::isnan(wanted) ? !std::isnan(got) : !(std::fabs(got - wanted) <= tolerance))
    fail("%s is %.9g, not %.9g +- %.3g", what, got, wanted, tolerance);
}

// Halves as their bits, and what they are.
uint16_t random_half(int64_t kind) {
  if (kind == 0) return static_cast<uint16_t>(below(1 << 10) | below(2) << 15);  // a denormal
  if (kind == 1) return one_of<uint16_t>({0x7c00, 0xfc00, 0x7e01});               // not finite
  return static_cast<uint16_t>(below(5 << 10) + (9 << 10) + (below(2) << 15));    // from 2^-6 to 2^-1
}

double value_of(uint16_t half) {
  const int exponent = half >> 10 & 31, rest = half & 1023;
  const double size = exponent == 31 ? (rest ? NAN : INFINITY) : exponent ? std::ldexp(1024 + rest, exponent - 25)
                                                                           : std::ldexp(rest, -24);
  return half & 0x8000 ? -size : size;
}

// A block of a random matrix: its payload, and what that is.
struct Block {
  const StackFormat& f;
  Array<uint8_t> payload;

  Block(const StackFormat& format, bool wild, bool largest) : f(format), payload(f.bytes()) {
    auto fill = [&](uint16_t* at, int64_t count, int64_t padded) {
      for (int64_t r = 0; r < f.rank; ++r)
        for (int64_t i = 0; i < padded; ++i)
          at[r * padded + i] = i >= count ? uint16_t{0} : random_half(below(30) ? 2 : wild && below(20) == 0 ? 1 : 0);
    };
    fill(halves(0), f.inputs, f.padded());
    fill(halves(f.u_at()), f.outputs, f.panels() * kPanel);
    if (largest) {  // sums of codes, of a row that is all the same
      for (int64_t r = 0; r < f.rank; ++r) std::fill_n(halves(0) + r * f.padded(), f.inputs, uint16_t{0x3c00});
      std::memset(payload.data() + f.signs_at(), below(2) ? 0xff : 0, static_cast<size_t>(f.bytes() - f.signs_at()));
    }
  }
  uint16_t* halves(int64_t at) { return reinterpret_cast<uint16_t*>(payload.data() + at); }
  double v(int64_t r, int64_t k) { return value_of(halves(0)[r * f.padded() + k]); }
  double u(int64_t r, int64_t n) { return value_of(halves(f.u_at())[r * f.panels() * kPanel + n]); }
  int sign(int64_t n, int64_t k) {
    const uint8_t* panel = payload.data() + f.signs_at() + n / kPanel * f.panel_bytes();
    return panel[k / 32 * 64 + n % kPanel * 4 + k % 4] >> (k % 32 / 4) & 1 ? 1 : -1;
  }
  double weight(int64_t n, int64_t k) {
    double size = 0;
    for (int64_t r = 0; r < f.rank; ++r) size += u(r, n) * v(r, k);
    return sign(n, k) * size;
  }
};

// A base of random bytes whose integers fit int8.
Array<uint8_t> random_base(const LinearFormat& f) {
  Array<uint8_t> base(f.bytes());
  for (int64_t p = 0; p < f.panels(); ++p) {
    uint8_t* panel = base.data() + p * f.panel_bytes();
    for (int64_t i = 0; i < f.spans() * kPanel; ++i)
      reinterpret_cast<float*>(panel)[i] = p * kPanel + i % kPanel < f.outputs ? normal() * 0.01f : 0;
    auto fits = [&](int group) {
      const int zero = group >> 4, most = f.step() * ((1 << f.bits) - 1) - zero;
      return (group & 15) * std::max(zero, std::abs(most)) < 128;
    };
    for (int64_t i = 0; f.bits < 8 && i < f.groups() * kPanel; ++i)
      while (!fits(panel[f.groups_at() + i])) panel[f.groups_at() + i] = static_cast<uint8_t>(below(256));
  }
  return base;
}

// Rows of 64 times the Walsh-Hadamard matrix / 8.
void rotate(double* x, int64_t count) {
  for (int64_t at = 0; at < count; at += kBlock) {
    double y[kBlock] = {};
    for (int i = 0; i < kBlock; ++i)
      for (int j = 0; j < kBlock; ++j) y[i] += __builtin_parity(static_cast<unsigned>(i & j)) ? -x[at + j] : x[at + j];
    for (int i = 0; i < kBlock; ++i) x[at + i] = y[i] / 8;
  }
}

struct Path {
  const char* name;
  const LinearPath* linear;
  const StackPath* stack;
};
std::vector<Path> paths;  // the scalar one first

// A product in double precision of the prepared row x: the base's, then those of all blocks.
void check_product(const StackFormat& f, std::vector<Block>& blocks, const float* base, const double* x,
                   const float* y) {
  double square = 0;
  for (int64_t k = 0; k < f.inputs; ++k) square += x[k] * x[k];
  for (int64_t n = 0; n < f.outputs; ++n) {
    double wanted = 0, size = 0;
    for (int64_t k = 0; k < f.inputs; ++k) {
      double weight = base ? double{base[n * f.inputs + k]} : 0, most = std::fabs(weight);
      for (auto& block : blocks) {
        weight += block.weight(n, k);
        for (int64_t r = 0; r < f.rank; ++r) most += std::fabs(block.u(r, n) * block.v(r, k));
      }
      wanted += weight * x[k];
      size += most * most;
    }
    // Codes of 8 bits, of activations and perhaps of weights: errors of a hundredth of the largest, which add at random
    expect_near("a product", y[n], wanted, 0.1 * std::sqrt(size * square) + 1e-27);  // what is below 1e-30 counts as 0
  }
}

StackFormat random_format(bool gated) {
  const auto sizes = {1, 7, 15, 16, 17, 33, 63, 64, 65, 97, 127, 128, 129, 192, 251, 256, 320, 512, 640, 700};
  StackFormat f{one_of(sizes), one_of(sizes), static_cast<int>(1 + below(4)), false};
  if (below(20) == 0) f.rank = kStackRanks;
  if (below(8) == 0) f = {one_of({2113, 8700}), 1 + below(40), 1, false};  // longer than what is added up in 16 bits
  if (gated) f.outputs = (f.outputs + 2 * kPanel - 1) / (2 * kPanel) * (2 * kPanel);
  f.rotated = f.inputs % kBlock == 0 && below(2);
  if (!f.valid() || !f.rebuilt().valid()) fail("a valid format was refused");
  return f;
}

LinearFormat random_base_format(const StackFormat& f) {
  LinearFormat base{f.inputs, f.outputs, one_of({2, 3, 4, 8}), 0, 0, f.rotated};
  base.span = std::min(one_of<int64_t>({64, 128, 192, 256, f.padded()}), f.padded());
  do {
    base.group = base.bits == 8 ? base.span : one_of<int64_t>({32, 64, 128, base.span});
  } while (base.span % base.group);
  if (!base.valid()) fail("a valid base was refused");
  return base;
}

void check_round() {
  const auto activation =
      below(3) ? Activation::none : one_of({Activation::silu, Activation::gelu, Activation::gelu_tanh});
  const bool gated = activation != Activation::none, wild = below(8) == 0, largest = below(4) == 0;
  StackFormat f;
  int64_t rows, count;
  do {
    f = random_format(gated);
    rows = one_of<int64_t>({1, 1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 31, 33, 40});
    count = below(9);
  } while (f.padded() * f.panels() * kPanel * rows * (count * f.rank + 1) > 6'000'000);
  std::vector<Block> blocks;
  std::vector<const uint8_t*> payloads;
  for (int64_t i = 0; i < count; ++i) blocks.emplace_back(f, wild, largest);
  for (auto& block : blocks) payloads.push_back(block.payload.data());
  const LinearFormat base_format = random_base_format(f);
  const bool based = !count || below(2);
  const Array<uint8_t> base = random_base(base_format);
  const StackWeights weights{&base_format, based ? base.data() : nullptr, payloads.data(), static_cast<int>(count)};
  const int64_t columns = gated ? f.outputs / 2 : f.outputs;

  Array<float> x(rows * f.inputs, below(4)), norm(f.inputs), bias(f.outputs, below(4)), residual(rows * f.outputs, 1);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = normal();
  if (wild) x[below(x.size())] = one_of({INFINITY, NAN});
  if (below(5) == 0) std::fill_n(x.data(), f.inputs, below(2) ? 0 : 1e-32f);
  if (largest) std::fill_n(x.data(), f.inputs, 1.0f);
  for (auto array : {&norm, &bias, &residual})
    for (int64_t i = 0; i < array->size(); ++i) (*array)[i] = normal();
  LinearCall call{};
  call.rows = rows;
  call.x = x.data();
  call.norm = !largest && below(2) ? norm.data() : nullptr;
  call.epsilon = 1e-6f;
  call.bias = !gated && below(2) ? bias.data() : nullptr;
  call.residual = !gated && below(2) ? residual.data() : nullptr;
  call.activation = activation;

  // The base's weights, as they are stored
  Array<float> dense(f.outputs * f.inputs);
  if (based) {
    LinearFormat stored = base_format;
    stored.rotated = false;
    for (int64_t n = 0; n < f.outputs; ++n) linear_rows(stored, base.data(), &n, 1, 1, dense.data() + n * f.inputs);
  }
  const LinearFormat rebuilt = f.rebuilt();
  const Path& scalar = paths[0];
  int one = 1;
  auto product = [&](const Path& path, LinearCall of, float* y, int& threads) {
    of.y = y;
    if (!stack_linear(*path.linear, *path.stack, f, weights, of, on(threads))) fail("no memory");
  };

  // The scalar path against double precision
  Array<float> wanted(rows * columns);
  product(scalar, call, wanted.data(), one);
  if (!wild && f.outputs * f.inputs * (count * f.rank + 1) < 300'000) {
    LinearCall plain = call;
    plain.rows = f.few(rows) ? std::min<int64_t>(rows, 2) : rows;
    plain.bias = plain.residual = nullptr;
    plain.activation = Activation::none;
    Array<float> y(plain.rows * f.outputs), prepared(f.inputs);
    product(scalar, plain, y.data(), one);
    for (int64_t row = 0; row < std::min<int64_t>(plain.rows, 2); ++row) {
      scalar.linear->prepare(rebuilt, x.data() + row * f.inputs, call.norm, call.epsilon, prepared.data());
      const std::vector<double> values(prepared.data(), prepared.data() + f.inputs);
      check_product(f, blocks, based ? dense.data() : nullptr, values.data(), y.data() + row * f.outputs);
    }
  }
  std::vector<Array<uint8_t>> panels;
  for (int64_t panel = 0; panel < f.panels(); ++panel) {
    Array<int8_t> room(f.padded() * kPanel);
    panels.emplace_back(rebuilt.panel_bytes());
    scalar.stack->rebuild(f, weights, panel, room.data(), panels.back().data());
  }
  for (int64_t i = 0; i < 20 && !wild; ++i) {  // weights, as rows in floats and as the codes of rebuilt panels
    const int64_t n = below(f.outputs), k = below(f.inputs);
    std::vector<double> row(static_cast<size_t>(f.inputs));
    double most = 0;  // of what a weight is added up from
    for (int64_t at = 0; at < f.inputs; ++at) {
      double& weight = row[static_cast<size_t>(at)] = based ? double{dense[n * f.inputs + at]} : 0;
      double size = std::fabs(weight);
      for (auto& block : blocks) {
        weight += block.weight(n, at);
        for (int64_t r = 0; r < f.rank; ++r) size += std::fabs(block.u(r, n) * block.v(r, at));
      }
      most = std::max(most, size);
    }
    const uint8_t* panel = panels[static_cast<size_t>(n / kPanel)].data();
    const float scale = reinterpret_cast<const float*>(panel)[k / rebuilt.span * kPanel + n % kPanel];
    const int code = static_cast<int8_t>(panel[rebuilt.codes_at() + k / 4 * 64 + n % kPanel * 4 + k % 4]);
    expect_near("a rebuilt weight", scale * static_cast<float>(code), row[static_cast<size_t>(k)],
                0.501 * std::fabs(double{scale}) + 1e-5 * most);
    Array<float> found(f.inputs, 1);
    stack_rows(f, weights, &n, 1, 1.5f, found.data());
    if (f.rotated) rotate(row.data(), f.inputs);
    expect_near("a weight of stack_rows", found[k], 1.5 * row[static_cast<size_t>(k)], 2e-5 * most + 1e-12);
  }

  // Every path against the scalar one
  for (const Path& path : paths) {
    for (int64_t panel = 0; panel < f.panels(); ++panel) {
      Array<int8_t> room(f.padded() * kPanel);
      Array<uint8_t> to(rebuilt.panel_bytes());
      path.stack->rebuild(f, weights, panel, room.data(), to.data());
      const uint8_t* reference = panels[static_cast<size_t>(panel)].data();
      expect_same("a rebuilt panel's scales", path.name, reinterpret_cast<const float*>(to.data()),
                  reinterpret_cast<const float*>(reference), rebuilt.spans() * kPanel);
      const int64_t rest = rebuilt.groups_at();
      expect_same("a rebuilt panel", path.name, to.data() + rest, reference + rest, rebuilt.panel_bytes() - rest);
    }
    int threads = static_cast<int>(1 + below(4));
    Array<float> y(rows * columns, below(4));
    LinearCall mine = call;
    if (call.residual && below(2)) {
      std::memcpy(y.data(), residual.data(), static_cast<size_t>(rows * columns) * sizeof(float));
      mine.residual = y.data();
    }
    product(path, mine, y.data(), threads);
    expect_same(f.few(rows) ? "a product of few rows" : "a product of many rows", path.name, y.data(),
                wanted.data(), rows * columns);
  }
}

}  // namespace

int main(int argc, char** argv) {
  seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  const int64_t rounds = argc > 2 ? std::atoll(argv[2]) : 100;
  std::printf("seed %" PRIu64 ", %" PRId64 " rounds, paths:", seed, rounds);
  for (auto name : {"scalar", "avx2", "avx512", "amx", "neon", "i8mm"})
    if (linear_path(name)) {
      if (!stack_path(name)) fail("%s has no stack", name);
      paths.push_back({name, linear_path(name), stack_path(name)});
      std::printf(" %s", name);
    }
  std::printf("; the fastest: %s\n", paths.back().name);
  std::fflush(stdout);
  engine.seed(seed);
  for (current_round = 0; current_round < rounds; ++current_round) check_round();
  std::printf("all the same\n");
}
