// The products of gathered.h. Included by a path inside its namespace, which brings `Words` and `Wide`, vectors of kWords
// and kWide words, the second as wide as the path goes; add_quads<Bits>(sum, codes, x) of both, which adds to each word of
// `sum` the products of its four codes and inputs; kBias, by how much that takes signed codes of 8 bits to be too large;
// and group_of<Bits>(at), kWide bytes of groups as integers, signed where they are.

constexpr int kTogether = 16;  // channels of a group that are added at once, at most

inline Words words_at(const void* at) {
  Words found;
  std::memcpy(&found, at, sizeof found);
  return found;
}

// The first `count` words; zeros behind them.
inline Words words_at(const void* at, int64_t count) {
  Words found{};
  std::memcpy(&found, at, static_cast<size_t>(count) * 4);
  return found;
}

inline int32_t add_up(Words sums) {
  uint32_t found = 0;
  for (int i = 0; i < kWords; ++i) found += sums[i];
  return static_cast<int32_t>(found);
}

// The multipliers of a row's words from input k on. They are of so many half blocks, 1, 2 or 4.
template <int Bits, bool OfHalves>
Words multipliers(const LinearFormat& f, const uint8_t* groups, int64_t k) {
  constexpr int kCount = kWords / Bits;
  uint32_t bytes = 0;
  if constexpr (OfHalves) {
    std::memcpy(&bytes, groups + k / 32, kCount);
  } else {
    for (int i = 0; i < kCount && k + 32 * i < f.padded(); ++i)
      bytes |= static_cast<uint32_t>(groups[(k + 32 * i) / f.group]) << 8 * i;
  }
  Words shifts;
  for (int i = 0; i < kWords; ++i) shifts[i] = static_cast<uint32_t>(i / Bits * 8);
  return (Words{} + bytes) >> shifts & 15u;
}

// `sum` and what the row's words from w on come to; of the last ones `left` are there.
template <int Bits, bool OfHalves, bool Whole = true>
Words add_words(const LinearFormat& f, Words sum, const uint8_t* codes, const uint32_t* dealt, const uint8_t* groups,
                int64_t words, int64_t w, int64_t left = kWords) {
  constexpr uint32_t kMask = Bits == 4 ? 0x0f0f0f0f : 0x03030303;
  const Words v = Whole ? words_at(codes + 4 * w) : words_at(codes + 4 * w, left);
  Words quads{};
  for (int plane = 0; plane < 8 / Bits; ++plane) {
    const uint32_t* at = dealt + plane * words + w;
    const Words x = Whole ? words_at(at) : words_at(at, left);
    quads = add_quads<Bits>(quads, Bits == 8 ? v : v >> static_cast<uint32_t>(plane * Bits) & kMask, x);
  }
  if constexpr (Bits < 8) quads *= multipliers<Bits, OfHalves>(f, groups, w * 32 / Bits);
  return sum + quads;
}

// One output's sum.
template <int Bits, bool OfHalves>
float row_sum(const LinearFormat& f, const Activations& a, const float* scales, const uint8_t* groups,
              const uint8_t* codes, const uint32_t* dealt) {
  const int64_t words = f.padded() * Bits / 32;
  float y = 0;
  for (int64_t span = 0, w = 0, group = 0; span < f.spans(); ++span) {
    const int64_t end = std::min(w + f.span * Bits / 32, words);
    Words sums{};
    for (; w + kWords <= end; w += kWords)
      sums = add_words<Bits, OfHalves>(f, sums, codes, dealt, groups, words, w);
    if (w < end) sums = add_words<Bits, OfHalves, false>(f, sums, codes, dealt, groups, words, w, end - w);
    w = end;
    int32_t sum = add_up(sums);
    if constexpr (Bits == 8) {
      sum -= (static_cast<int8_t>(groups[span]) + kBias) * a.totals[span];
    } else {
      int32_t zeros = 0;
      const int64_t stop = std::min(group + f.span / f.group, f.groups());
      for (; group < stop; ++group) zeros += (groups[group] & 15) * (groups[group] >> 4) * a.sums[group];
      sum = sum * (Bits < 4 ? 2 : 1) - zeros;
    }
    y = __builtin_fmaf(static_cast<float>(sum), a.scales[span] * scales[span], y);
  }
  return y;
}

template <int Bits, bool OfHalves>
void rows_of(const LinearFormat& f, const uint8_t* panel, const Activations& a, const uint32_t* dealt, unsigned which,
             float* out) {
  for (; which; which &= which - 1) {
    const int r = __builtin_ctz(which);
    out[r] = row_sum<Bits, OfHalves>(f, a, reinterpret_cast<const float*>(panel) + r * f.spans(),
                                     row_at(f, panel, r), row_at(f, panel, r) + row_codes(f), dealt);
  }
}

void rows(const LinearFormat& f, const uint8_t* panel, const Activations& a, const uint32_t* dealt, unsigned which,
          float* out) {
  const bool of_halves = f.group == 32;
  switch (f.bits) {
    case 2: return (of_halves ? rows_of<2, true> : rows_of<2, false>)(f, panel, a, dealt, which, out);
    case 4: return (of_halves ? rows_of<4, true> : rows_of<4, false>)(f, panel, a, dealt, which, out);
    default: return rows_of<8, false>(f, panel, a, dealt, which, out);
  }
}

// Channels of one group, in fours: where their codes begin, and what they are multiplied by.
struct Chunk {
  const uint8_t* at[kTogether];
  uint32_t quads[kTogether / 4];
  int32_t total;  // of the multipliers
  int fours;
  int64_t group;

  // The first of the channels from `first` to `end`, which it moves on.
  void take(const LinearFormat& f, const int32_t*& first, const int32_t* end, const uint8_t* codes, int64_t stride, const int8_t* x) {
    int count = 0;
    std::memset(quads, 0, sizeof quads);
    total = 0;
    group = first < end ? *first / f.group : -1;
    for (const int64_t last = (group + 1) * f.group; first < end && *first < last && count < kTogether; ++first, ++count) {
      at[count] = codes + *first * stride;
      quads[count / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(x[*first])) << count % 4 * 8;
      total += x[*first];
    }
    fours = (count + 3) / 4;
    for (; count < 4 * fours; ++count) at[count] = at[count - 1];
  }
};

// sums[p], whose word w is output 16 p + w of a line, of what a chunk comes to from byte `offset` of its channels on.
// `next` is what comes then: memory is asked for it now, since nobody else knows where it lies.
template <int Bits>
inline void add_chunk(const Chunk& chunk, const Chunk& next, int64_t offset, Wide (&sums)[32 / Bits]) {
  constexpr int kPlanes = 8 / Bits;
  constexpr uint32_t kMask = Bits == 4 ? 0x0f0f0f0f : 0x03030303, kBytes = 0x00ff00ff, kHalf = 0x0000ffff;
  if (offset % kLine == 0)
    for (int i = 0; i < 4 * next.fours; ++i) __builtin_prefetch(next.at[i] + offset, 0, kSecond);
  for (int i = 0; i < chunk.fours; ++i) {
    Wide v[4];
    for (int c = 0; c < 4; ++c) std::memcpy(&v[c], chunk.at[4 * i + c] + offset, sizeof v[c]);
    // Bytes of four channels to quads of one output each, by halves and then by quarters of words
    const Wide even[] = {(v[0] & kHalf) | v[2] << 16u, v[0] >> 16u | (v[2] & ~kHalf)};
    const Wide odd[] = {(v[1] & kHalf) | v[3] << 16u, v[1] >> 16u | (v[3] & ~kHalf)};
    const Wide x = Wide{} + chunk.quads[i];
    for (int half = 0; half < 2; ++half) {
      const Wide bytes[] = {(even[half] & kBytes) | (odd[half] & kBytes) << 8u,
                            (even[half] >> 8u & kBytes) | (odd[half] & ~kBytes)};
      for (int byte = 0; byte < 2; ++byte)
        for (int plane = 0; plane < kPlanes; ++plane) {
          Wide& sum = sums[(half * 2 + byte) * kPlanes + plane];
          sum = add_quads<Bits>(sum, Bits == 8 ? bytes[byte] : bytes[byte] >> static_cast<uint32_t>(plane * Bits) & kMask, x);
        }
    }
  }
}

template <int Bits>
void columns_bits(const LinearFormat& f, const uint8_t* matrix, const Activations& a, const int32_t* channels,
                  int64_t active, int64_t line, int64_t count, int32_t* sums, float* out) {
  typedef int32_t Integers __attribute__((vector_size(4 * kWide), may_alias));
  const GatheredDown layout(f);
  const int64_t per_line = line_outputs(f), outputs = count * per_line, all = layout.outputs;
  const int8_t* x = a.block(0, 0, f.blocks());
  const uint8_t* codes = matrix + layout.codes_at + line * kLine;
  const int32_t* end = channels + active;
  std::fill(out, out + outputs, 0.f);
  Chunk chunks[2];
  int now = 0;
  chunks[0].take(f, channels, end, codes, layout.channel, x);
  for (int64_t span = 0; span < f.spans(); ++span) {
    std::fill(sums, sums + outputs, 0);
    for (; chunks[now].fours && chunks[now].group * f.group < (span + 1) * f.span; now = 1 - now) {
      const Chunk& chunk = chunks[now];
      chunks[1 - now].take(f, channels, end, codes, layout.channel, x);
      const uint8_t* groups = matrix + layout.groups_at + chunk.group * all + line * per_line;
      for (int64_t i = 0; i < count; ++i)
        for (int part = 0; part < kPanel; part += kWide) {
          Wide found[32 / Bits] = {};
          add_chunk<Bits>(chunk, chunks[1 - now], i * kLine + 4 * part, found);
          for (int p = 0; p < 32 / Bits; ++p) {
            const int64_t n = i * per_line + p * kPanel + part;
            const Integers both = (Integers)group_of<Bits>(groups + n);
            Integers sum = (Integers)found[p], before;
            if (Bits < 4) sum += sum;
            if constexpr (Bits == 8) sum -= (both + kBias) * chunk.total;
            else sum = (sum - (both >> 4) * chunk.total) * (both & 15);
            std::memcpy(&before, sums + n, sizeof before);
            sum += before;
            std::memcpy(sums + n, &sum, sizeof sum);
          }
        }
    }
    const float* __restrict scales = reinterpret_cast<const float*>(matrix) + span * all + line * per_line;
    const int32_t* __restrict from = sums;
    float* __restrict to = out;
    const float scale = a.scales[span];
    for (int64_t n = 0; n < outputs; ++n) to[n] = __builtin_fmaf(static_cast<float>(from[n]), scale * scales[n], to[n]);
  }
}

void columns(const LinearFormat& f, const uint8_t* matrix, const Activations& a, const int32_t* channels,
             int64_t active, int64_t line, int64_t count, int32_t* sums, float* out) {
  switch (f.bits) {
    case 2: return columns_bits<2>(f, matrix, a, channels, active, line, count, sums, out);
    case 4: return columns_bits<4>(f, matrix, a, channels, active, line, count, sums, out);
    default: return columns_bits<8>(f, matrix, a, channels, active, line, count, sums, out);
  }
}
