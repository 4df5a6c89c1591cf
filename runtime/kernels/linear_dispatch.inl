// From numbers to templates: which of a path's dot_rows<bits, rows> and expand_bits<bits> a call means. Included by a path
// inside its namespace, after both.

template <int Bits>
void dot_bits(const LinearFormat& f, const uint8_t* panel, const Activations& a, int64_t first, int64_t count,
              float* out, int64_t ld) {
  switch (count) {
    case 1: return dot_rows<Bits, 1>(f, panel, a, first, out, ld);
    case 2: return dot_rows<Bits, 2>(f, panel, a, first, out, ld);
    case 3: return dot_rows<Bits, 3>(f, panel, a, first, out, ld);
    default: return dot_rows<Bits, 4>(f, panel, a, first, out, ld);
  }
}

void dot(const LinearFormat& f, const uint8_t* panel, const Activations& a, int64_t first, int64_t count, float* out,
         int64_t ld) {
  switch (f.bits) {
    case 2: return dot_bits<2>(f, panel, a, first, count, out, ld);
    case 3: return dot_bits<3>(f, panel, a, first, count, out, ld);
    case 4: return dot_bits<4>(f, panel, a, first, count, out, ld);
    default: return dot_bits<8>(f, panel, a, first, count, out, ld);
  }
}

void expand(const LinearFormat& f, const uint8_t* panel, int8_t* to) {
  switch (f.bits) {
    case 2: return expand_bits<2>(f, panel, to);
    case 3: return expand_bits<3>(f, panel, to);
    case 4: return expand_bits<4>(f, panel, to);
    default: return expand_bits<8>(f, panel, to);
  }
}
