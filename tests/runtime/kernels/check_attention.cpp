// Compares every attention path of this machine with the scalar one, and that one with a softmax in double precision
// over the same stored keys and values: in pieces as a test deals them, and as the operator does over 1 to 4 threads,
// whose bits must not depend on their number; exact, and rounded to 16 bits. Shapes of real models, then random ones.
//
//   check_attention [seed [cases]]      exits with 1 at the first difference
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "threads.h"

namespace {

using shoal::AttentionCall;
using shoal::AttentionPath;
using shoal::AttentionShape;
using shoal::CacheType;

// Of the size of the values that an output averages; more where a score is the sum of terms so large that its own last
// digits weigh.
constexpr double kBound = 1e-5, kTerms = 16;
// Of the greatest value, which fast attention rounds a block by: at worst, and the root of the mean square.
constexpr double kFastBound = 0.03, kFastUsual = 0.007;

std::mt19937 generator;

int64_t uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

template <class T>
T one_of(std::initializer_list<T> choices) {
  return choices.begin()[uniform(0, static_cast<int64_t>(choices.size()) - 1)];
}

std::vector<float> normal(int64_t count, float mean, float deviation) {
  std::normal_distribution<float> distribution(mean, deviation);
  std::vector<float> numbers(count);
  for (float& x : numbers) x = distribution(generator);
  return numbers;
}

double half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                     : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -size : size;
}

struct Case {
  AttentionShape shape;
  int64_t batch, length, past;  // past: of the longest sequence
  bool q_norm, k_norm;
  float deviation;
};

int64_t size_of(CacheType type) { return type == CacheType::f32 ? 4 : type == CacheType::f16 ? 2 : 1; }

// The tensors of a case; those that paths write, each path has for itself.
class Attention {
 public:
  explicit Attention(const Case& c) : c_(c), shape_(c.shape) {
    const int64_t n = shape_.head_dim, rows = c.batch * c.length;
    qkv_ = normal(rows * (shape_.heads + 2 * shape_.kv_heads) * n, 0, c.deviation);
    q_norm_ = normal(n, 1, 0.2f);
    k_norm_ = normal(n, 1, 0.2f);
    for (int64_t i = 0; i < shape_.kv_heads * n; ++i) {
      k_scale_.push_back(c.deviation * static_cast<float>(uniform(20, 40)) / 1000);
      v_scale_.push_back(c.deviation * static_cast<float>(uniform(20, 40)) / 1000);
    }
    int64_t positions = 0;
    for (int64_t b = 0; b < c.batch; ++b) {
      last_.push_back(static_cast<int32_t>(c.length - 1 + (b ? uniform(0, c.past) : c.past)));
      positions = std::max<int64_t>(positions, last_[b] + 1);
    }
    for (int64_t p = 0; p < positions; ++p) {
      for (int64_t i = 0; i < shape_.pairs; ++i) {
        const double angle = static_cast<double>(p) * std::pow(10000.0, -static_cast<double>(i) / shape_.pairs);
        cos_.push_back(static_cast<float>(std::cos(angle)));
        sin_.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    // What lies where no row sees is not a number (0x7f: a huge float, a half that is none), and must not matter.
    const unsigned char garbage = one_of<unsigned char>({0x7f, 0xff});
    const int64_t bytes = c.batch * shape_.kv_heads * shape_.capacity * n * size_of(shape_.cache);
    keys_.assign(bytes, garbage);
    values_.assign(bytes, garbage);
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t first = last_[b] - c.length + 1, seen = shape_.window ? first - shape_.window + 1 : 0;
      for (int64_t h = 0; h < shape_.kv_heads; ++h) {
        for (int64_t p = std::max<int64_t>(0, seen); p < first; ++p) {
          for (int64_t i = 0; i < n; ++i) {
            put(keys_, (((b * shape_.kv_heads + h) * shape_.capacity) + p) * n + i);
            put(values_, (((b * shape_.kv_heads + h) * shape_.capacity) + p) * n + i);
          }
        }
      }
    }
  }

  struct Result {
    std::vector<unsigned char> keys, values;
    std::vector<float> out;
  };

  // In items of random rows, with exactly the scratch memory that was promised.
  Result run(const AttentionPath& path) const {
    return with([&](const AttentionCall& call) {
      std::vector<unsigned char> scratch(shoal::scratch_bytes(shape_), 0xff);
      for (const bool storing : {true, false}) {
        for (int64_t b = 0; b < c_.batch; ++b) {
          for (int64_t h = 0; h < shape_.kv_heads; ++h) {
            for (int64_t from = 0; from < c_.length;) {
              const int64_t to = uniform(0, 2) ? c_.length : uniform(from + 1, c_.length);
              if (storing) {
                path.store(shape_, call, b, h, from, to);
              } else {
                path.attend(shape_, call, b, h, from, to, scratch.data());
              }
              from = to;
            }
          }
        }
      }
    });
  }

  // As the operator does.
  Result spread(const AttentionPath& path, int threads, bool fast) const {
    AttentionShape shape = shape_;
    shape.fast = fast;
    return with([&](const AttentionCall& call) {
      if (!shoal::attention(path, shape, call, on(threads))) fail("no memory");
    });
  }

  // For each head of each row: how far its output is from what it should be, how far it may be (by the size of the values
  // that it averages: the average itself may happen to be near zero), and how large the greatest value of its cache is.
  struct Judged {
    double error, bound, greatest;
    int64_t sequence, row, head;
  };
  template <class Judge>
  void compare(const Result& result, Judge judge) const {
    const int64_t n = shape_.head_dim, group = shape_.heads / shape_.kv_heads;
    for (int64_t b = 0; b < c_.batch; ++b) {
      const int64_t oldest = last_[b] - c_.length + 1 - (shape_.window ? shape_.window - 1 : last_[b]);
      std::vector<double> greatest(shape_.heads);
      for (int64_t h = 0; h < shape_.heads; ++h) {
        const int64_t head = h / group, cache = (b * shape_.kv_heads + head) * shape_.capacity * n;
        for (int64_t at = std::max<int64_t>(0, oldest) * n; at < (last_[b] + 1) * n; ++at)
          greatest[h] = std::max(greatest[h], std::fabs(get(result.values, cache + at, v_scale_[head * n + at % n])));
      }
      for (int64_t row = 0; row < c_.length; ++row) {
        const int64_t position = last_[b] - c_.length + 1 + row;
        const int64_t first = shape_.window ? std::max<int64_t>(0, position - shape_.window + 1) : 0;
        for (int64_t h = 0; h < shape_.heads; ++h) {
          const std::vector<double> query = turned(b, row, h, c_.q_norm ? q_norm_.data() : nullptr);
          const int64_t cache = (b * shape_.kv_heads + h / group) * shape_.capacity, channels = h / group * n;
          std::vector<double> weights;
          double peak = -INFINITY, total = 0, terms = 0;
          for (int64_t p = first; p <= position; ++p) {
            double score = 0, size = 0;
            for (int64_t i = 0; i < n; ++i) {
              const double term = query[i] * get(result.keys, (cache + p) * n + i, k_scale_[channels + i]);
              score += term;
              size += std::fabs(term) * static_cast<double>(shape_.scale);
            }
            terms = std::max(terms, size);
            weights.push_back(score * static_cast<double>(shape_.scale));
            peak = std::max(peak, weights.back());
          }
          for (double& weight : weights) total += weight = std::exp(weight - peak);
          std::vector<double> want(n), sizes(n);
          for (int64_t p = first; p <= position; ++p) {
            for (int64_t i = 0; i < n; ++i) {
              const double value = get(result.values, (cache + p) * n + i, v_scale_[channels + i]);
              want[i] += weights[p - first] / total * value;
              sizes[i] += weights[p - first] / total * std::fabs(value);
            }
          }
          double largest = 0, worst = 0;
          const float* got = result.out.data() + ((b * c_.length + row) * shape_.heads + h) * n;
          for (int64_t i = 0; i < n; ++i) {
            largest = std::max(largest, sizes[i]);
            const double error = std::fabs(want[i] - static_cast<double>(got[i]));
            worst = error <= worst ? worst : error;  // NaN is worst
          }
          const double bound = kBound * largest * std::max(1.0, terms / kTerms);
          judge(Judged{worst, bound, greatest[h], b, row, h});
        }
      }
    }
  }

  // Whether what was stored is what should be, and nothing else was touched.
  void check_stored(const Result& result) const {
    const int64_t n = shape_.head_dim, bytes = size_of(shape_.cache);
    for (int64_t b = 0; b < c_.batch; ++b) {
      for (int64_t h = 0; h < shape_.kv_heads; ++h) {
        for (int64_t p = 0; p < shape_.capacity; ++p) {
          const int64_t at = ((b * shape_.kv_heads + h) * shape_.capacity + p) * n;
          const int64_t row = p - (last_[b] - c_.length + 1);
          if (row < 0 || row >= c_.length) {
            if (std::memcmp(&result.keys[at * bytes], &keys_[at * bytes], n * bytes) ||
                std::memcmp(&result.values[at * bytes], &values_[at * bytes], n * bytes))
              fail("position %lld was written, which is not new", p);
            continue;
          }
          const std::vector<double> key = turned(b, row, shape_.heads + h, c_.k_norm ? k_norm_.data() : nullptr);
          for (int64_t i = 0; i < n; ++i) {
            const float value = vector(b, row, shape_.heads + shape_.kv_heads + h)[i];
            check_number(key[i], get(result.keys, at + i, k_scale_[h * n + i]), k_scale_[h * n + i], 1e-5);
            check_number(value, get(result.values, at + i, v_scale_[h * n + i]), v_scale_[h * n + i], 0);
          }
        }
      }
    }
  }

  template <class... Numbers>
  [[noreturn]] void fail(const char* message, Numbers... numbers) const {
    std::fprintf(stderr, message, static_cast<long long>(numbers)..., 0);  // 0: clang refuses none
    std::fprintf(stderr,
                 "\n  heads %lld/%lld head_dim %lld capacity %lld pairs %lld window %lld cache %d"
                 "\n  batch %lld length %lld past %lld norms %d %d deviation %g\n",
                 (long long)shape_.heads, (long long)shape_.kv_heads, (long long)shape_.head_dim,
                 (long long)shape_.capacity, (long long)shape_.pairs, (long long)shape_.window,
                 static_cast<int>(shape_.cache), (long long)c_.batch, (long long)c_.length, (long long)c_.past,
                 c_.q_norm, c_.k_norm, static_cast<double>(c_.deviation));
    std::exit(1);
  }

 private:
  template <class Work>
  Result with(Work work) const {
    Result result = {keys_, values_, std::vector<float>(c_.batch * c_.length * shape_.heads * shape_.head_dim, NAN)};
    const bool scaled = shape_.cache == CacheType::i8;
    work({c_.batch, c_.length, last_.data(), qkv_.data(), c_.q_norm ? q_norm_.data() : nullptr,
          c_.k_norm ? k_norm_.data() : nullptr, cos_.data(), sin_.data(), result.keys.data(), result.values.data(),
          scaled ? k_scale_.data() : nullptr, scaled ? v_scale_.data() : nullptr, result.out.data()});
    return result;
  }

  void put(std::vector<unsigned char>& cache, int64_t at) const {
    const float x = std::normal_distribution<float>(0, c_.deviation)(generator);
    const int8_t code = static_cast<int8_t>(uniform(-128, 127));
    const uint16_t bits = static_cast<uint16_t>(uniform(0, 1) << 15 | uniform(0, 16) << 10 | uniform(0, 1023));
    switch (shape_.cache) {
      case CacheType::f32: std::memcpy(&cache[at * 4], &x, 4); break;
      case CacheType::f16: std::memcpy(&cache[at * 2], &bits, 2); break;
      case CacheType::i8: std::memcpy(&cache[at], &code, 1); break;
    }
  }

  double get(const std::vector<unsigned char>& cache, int64_t at, float scale) const {
    float x;
    uint16_t bits;
    switch (shape_.cache) {
      case CacheType::f32: return std::memcpy(&x, &cache[at * 4], 4), x;
      case CacheType::f16: return std::memcpy(&bits, &cache[at * 2], 2), half(bits);
      default: return static_cast<int8_t>(cache[at]) * static_cast<double>(scale);
    }
  }

  void check_number(double want, double got, float scale, double slack) const {
    const double size = std::fabs(want);
    double bound = slack * std::max(size, 0.1);
    if (shape_.cache == CacheType::f16) bound += std::max(size / 2048, 0x1p-25);
    if (shape_.cache == CacheType::i8) {
      bound += static_cast<double>(scale) * 0.5001;
      if (want > 127 * static_cast<double>(scale)) want = 127 * static_cast<double>(scale);
      if (want < -128 * static_cast<double>(scale)) want = -128 * static_cast<double>(scale);
    }
    if (!(std::fabs(want - got) <= bound)) {
      std::fprintf(stderr, "%.9g was stored as %.9g\n", want, got);
      fail("stored wrongly");
    }
  }

  const float* vector(int64_t b, int64_t row, int64_t head) const {
    return &qkv_[((b * c_.length + row) * (shape_.heads + 2 * shape_.kv_heads) + head) * shape_.head_dim];
  }

  std::vector<double> turned(int64_t b, int64_t row, int64_t head, const float* norm) const {
    const int64_t n = shape_.head_dim, pairs = shape_.pairs, position = last_[b] - c_.length + 1 + row;
    const float* from = vector(b, row, head);
    std::vector<double> x(from, from + n);
    if (norm) {
      double sum = 0;
      for (double value : x) sum += value * value;
      for (int64_t i = 0; i < n; ++i)
        x[i] *= norm[i] / std::sqrt(sum / static_cast<double>(n) + static_cast<double>(shape_.epsilon));
    }
    for (int64_t i = 0; i < pairs; ++i) {
      const double a = x[i], z = x[i + pairs], cos = cos_[position * pairs + i], sin = sin_[position * pairs + i];
      x[i] = a * cos - z * sin;
      x[i + pairs] = z * cos + a * sin;
    }
    return x;
  }

  Case c_;
  AttentionShape shape_;
  std::vector<float> qkv_, q_norm_, k_norm_, k_scale_, v_scale_, cos_, sin_;
  std::vector<int32_t> last_;
  std::vector<unsigned char> keys_, values_;
};

double worst_scalar = 0, worst = 0, worst_fast = 0, usual_fast = 0;
int cases = 0, most = 0;

// What a path gave against what the scalar one did, whose outputs have `bounds`.
void expect_near(const Attention& attention, const char* name, const Attention::Result& result,
                 const Attention::Result& scalar, const std::vector<double>& bounds, const AttentionShape& shape) {
  if (result.keys != scalar.keys || result.values != scalar.values) {
    std::fprintf(stderr, "%s: ", name);
    attention.fail("stored other bits than scalar");
  }
  for (size_t i = 0; i < result.out.size(); ++i) {
    const double error = std::fabs(static_cast<double>(result.out[i]) - static_cast<double>(scalar.out[i]));
    const double relative = error / bounds[i / shape.head_dim];
    if (!(relative <= 1)) {
      std::fprintf(stderr, "%s: %.9g, scalar %.9g: ", name, static_cast<double>(result.out[i]),
                   static_cast<double>(scalar.out[i]));
      attention.fail("differs at row %lld head %lld channel %lld",
                     static_cast<int64_t>(i) / shape.head_dim / shape.heads,
                     static_cast<int64_t>(i) / shape.head_dim % shape.heads, static_cast<int64_t>(i) % shape.head_dim);
    }
    worst = std::max(worst, relative);
  }
}

void check(const Case& c, const std::vector<const AttentionPath*>& paths) {
  if (cases == most) return;
  const Attention attention(c);
  const Attention::Result scalar = attention.run(shoal::attention_scalar());
  attention.check_stored(scalar);
  std::vector<double> bounds;
  attention.compare(scalar, [&](const Attention::Judged& at) {
    bounds.push_back(at.bound);
    worst_scalar = std::max(worst_scalar, at.error / at.bound);
    if (!(at.error <= at.bound))
      attention.fail("scalar: wrong at sequence %lld row %lld head %lld", at.sequence, at.row, at.head);
  });
  std::vector<const AttentionPath*> all = paths;
  all.push_back(&shoal::attention_scalar());
  for (const AttentionPath* path : all) {
    if (path != all.back()) expect_near(attention, path->name, attention.run(*path), scalar, bounds, c.shape);
    for (const bool fast : {false, true}) {
      const Attention::Result one = attention.spread(*path, 1, fast);
      const Attention::Result more = attention.spread(*path, static_cast<int>(uniform(2, 4)), fast);
      if (one.keys != more.keys || one.values != more.values ||
          std::memcmp(one.out.data(), more.out.data(), one.out.size() * sizeof(float))) {
        std::fprintf(stderr, "%s%s: ", path->name, fast ? ", fast" : "");
        attention.fail("the bits depend on the number of threads");
      }
      if (!fast) {
        expect_near(attention, path->name, one, scalar, bounds, c.shape);
        continue;
      }
      double squares = 0;
      attention.compare(one, [&](const Attention::Judged& at) {
        const double relative = at.error / at.greatest;
        worst_fast = std::max(worst_fast, relative);
        squares += relative * relative;
        if (relative <= kFastBound) return;
        std::fprintf(stderr, "%s, fast: %g of %g: ", path->name, at.error, at.greatest);
        attention.fail("wrong at sequence %lld row %lld head %lld", at.sequence, at.row, at.head);
      });
      usual_fast = std::max(usual_fast, std::sqrt(squares / static_cast<double>(bounds.size())));
      if (squares > kFastUsual * kFastUsual * static_cast<double>(bounds.size())) {
        std::fprintf(stderr, "%s, fast: %g of it: ", path->name,
                     std::sqrt(squares / static_cast<double>(bounds.size())));
        attention.fail("usually wrong");
      }
    }
  }
  ++cases;
}

Case make(int64_t heads, int64_t kv_heads, int64_t n, int64_t length, int64_t past, CacheType cache) {
  Case c = {};
  c.shape = {heads, kv_heads, n, 0, n / 2, 0, 1 / std::sqrt(static_cast<float>(n)), 1e-6f, cache, false};
  c.batch = 1;
  c.length = length;
  c.past = past;
  c.deviation = 1;
  c.shape.capacity = past + length;
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? static_cast<unsigned>(std::strtoul(argv[1], nullptr, 10)) : std::random_device{}();
  most = argc > 2 ? std::atoi(argv[2]) : 300;
  std::printf("seed %u, %d cases, paths: scalar", seed, most);
  std::vector<const AttentionPath*> paths;  // but the scalar one
  for (auto name : {"avx2", "avx512", "neon"})
    if (auto path = shoal::attention_path(name)) {
      paths.push_back(path);
      std::printf(" %s", path->name);
    }
  std::printf("; the fastest: %s\n", shoal::attention_path().name);
  std::fflush(stdout);
  generator.seed(seed);
  const CacheType types[] = {CacheType::f32, CacheType::f16, CacheType::i8};

  // Shapes of real models, decoding and prefilling, and every length of the contract.
  std::vector<Case> usual;
  for (CacheType type : types) {
    usual.push_back(make(14, 2, 64, 1, 300, type));
    usual.push_back(make(14, 2, 64, 33, 70, type));
    usual.push_back(make(9, 3, 64, 17, 129, type));
    usual.push_back(make(4, 1, 256, 17, 33, type));
    usual.push_back(make(4, 1, 256, 1, 200, type));
    usual.push_back(make(2, 1, 64, 256, 65, type));
    usual.push_back(make(16, 2, 80, 2, 63, type));
    usual.push_back(make(5, 1, 96, 4, 127, type));
    usual.push_back(make(8, 8, 128, 3, 64, type));
    usual.push_back(make(40, 1, 32, 3, 20, type));
    usual.push_back(make(2, 1, 512, 40, 3, type));
    Case windowed = make(4, 2, 64, 150, 20, type);
    windowed.shape.window = 29;
    usual.push_back(windowed);
    windowed = make(7, 1, 16, 1, 500, type);
    windowed.shape.window = 97;
    usual.push_back(windowed);
    // Over several parts of the keys; a window begins and ends amid one
    usual.push_back(make(14, 2, 64, 1, 1300, type));
    usual.push_back(make(9, 3, 64, 5, 1021, type));
    usual.push_back(make(6, 2, 130, 2, 700, type));
    windowed = make(4, 1, 256, 4, 900, type);
    windowed.shape.window = 512;
    usual.push_back(windowed);
    windowed = make(4, 2, 80, 3, 1100, type);
    windowed.shape.window = 301;
    usual.push_back(windowed);
  }
  std::shuffle(usual.begin(), usual.end(), generator);
  for (const Case& c : usual) check(c, paths);

  while (cases < most) {
    const int64_t kv_heads = uniform(1, 4), group = uniform(1, 8);
    const int64_t n = uniform(0, 1) ? 2 * uniform(1, 24)
                                    : one_of<int64_t>({2, 6, 14, 34, 62, 64, 80, 96, 128, 130, 256});
    const int64_t length = one_of<int64_t>({1, 1, 1, 2, 3, 5, 7, 13, 17, 31, 33, 67});
    const int64_t past = one_of<int64_t>({0, 0, 1, 2, 15, 16, 17, 31, 47, 61, 63, 64, 65, 97, 127, 128, 191});
    Case c = make(kv_heads * group, kv_heads, n, length, past, types[uniform(0, 2)]);
    if (c.shape.heads * n * length * (length + past) > 1500000) continue;
    c.batch = uniform(0, 3) ? 1 : uniform(2, 3);
    c.q_norm = uniform(0, 1);
    c.k_norm = uniform(0, 1);
    c.deviation = one_of<float>({0.1f, 1, 1, 2});
    c.shape.capacity += uniform(0, 1) * uniform(1, 80);
    if (uniform(0, 2) == 0) c.shape.pairs = uniform(0, n / 2);
    if (uniform(0, 2) == 0) c.shape.window = uniform(0, 1) ? uniform(1, 8) : uniform(1, length + past + 3);
    check(c, paths);
  }

  std::printf("of the bounds: scalar %.2f from double precision, the others %.2f from scalar; fast within %.1e, %.1e usually\n",
              worst_scalar, worst, worst_fast, usual_fast);
}
