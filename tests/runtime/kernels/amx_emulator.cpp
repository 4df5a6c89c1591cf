// AMX-TILE and AMX-INT8 on processors without them, so that the kernels as compiled can be tested anywhere: their
// instructions trap, and the handler does what the manual says (Intel SDM volume 2, chapter "Intel AMX instruction set
// reference", palette 1). What the processor would fault on is printed and ends the program.
//
// Linked in or preloaded (LD_PRELOAD) it is in force from the start and for every thread; `shoal_amx_emulated` tells
// isa.cpp, which cannot ask the processor. Linux on x86-64. A signal for every run of such instructions: slow.
//
// Not done: start_row after a fault in the middle of a tile (a fault in memory is reported as such), prefixes before
// the instruction. Handlers of SIGILL that others install with sigaction (Python's faulthandler does) are kept for
// what is not AMX; one installed with signal() replaces this one.
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Shape {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Shape) == 64);

struct State {
  Shape shape;
  uint8_t tiles[kTiles][kRows][kRowBytes];
};
thread_local State state;  // zero: nothing is configured

struct Instruction {
  const uint8_t* at;
  int length;
  uint8_t opcode;
  int prefix;           // VEX.pp: none, 66, F3, F2
  int reg, rm, vvvv;    // registers; rm where there is no memory
  bool memory, sib;
  uintptr_t address;    // base + displacement, and the index where it is not a stride
  intptr_t index;       // scaled
};

[[noreturn]] void fault(const Instruction& i, const char* what) {
  char text[256];
  int size = snprintf(text, sizeof text, "amx emulator: %s at %p (opcode %02x, prefix %d, operands %d %d %d)\n", what,
                      static_cast<const void*>(i.at), i.opcode, i.prefix, i.reg, i.rm, i.vvvv);
  if (write(2, text, static_cast<size_t>(size)) < 0) _exit(126);
  abort();
}

// The register that an instruction numbers `number`.
greg_t value(const ucontext_t* context, int number) {
  constexpr int order[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                           REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[order[number]];
}

// Whether an AMX instruction of ours is at `at`: VEX.128 map 0F38 W0, opcodes 49, 4B, 5E. Reads no further than it.
bool decode(const ucontext_t* context, const uint8_t* at, Instruction& i) {
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84) || (at[3] != 0x49 && at[3] != 0x4b && at[3] != 0x5e))
    return false;
  const int r = at[1] & 0x80 ? 0 : 8, x = at[1] & 0x40 ? 0 : 8, b = at[1] & 0x20 ? 0 : 8;  // stored inverted
  const int mod = at[4] >> 6, low = at[4] & 7;
  i = {at, 5, at[3], at[2] & 3, (at[4] >> 3 & 7) | r, low | b, ~at[2] >> 3 & 15, mod != 3, false, 0, 0};
  if (!i.memory) return true;
  int base = i.rm, bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
  if (low == 4) {
    const uint8_t sib = at[i.length++];
    const int index = (sib >> 3 & 7) | x;
    i.sib = true;
    base = (sib & 7) | b;
    if (index != 4) i.index = static_cast<intptr_t>(static_cast<uint64_t>(value(context, index)) << (sib >> 6));
    if (mod == 0 && (sib & 7) == 5) base = -1, bytes = 4;
  }
  const bool relative = mod == 0 && low == 5;
  if (relative) bytes = 4;
  int64_t displacement = 0;
  if (bytes == 1) displacement = static_cast<int8_t>(at[i.length]);
  if (bytes == 4) {
    int32_t wide;
    memcpy(&wide, at + i.length, 4);
    displacement = wide;
  }
  i.length += bytes;
  const uint64_t from = relative  ? reinterpret_cast<uintptr_t>(at + i.length)
                        : base < 0 ? 0
                                   : static_cast<uint64_t>(value(context, base));
  i.address = from + static_cast<uint64_t>(displacement);
  return true;
}

bool any(const void* bytes, size_t count) {
  for (size_t at = 0; at < count; ++at)
    if (static_cast<const uint8_t*>(bytes)[at]) return true;
  return false;
}

void configure(const Instruction& i) {
  Shape shape;
  memcpy(&shape, reinterpret_cast<const void*>(i.address + static_cast<uintptr_t>(i.index)), sizeof shape);
  if (shape.palette > 1) fault(i, "#GP: ldtilecfg with an unknown palette");
  if (shape.palette == 1) {
    if (any(shape.reserved, sizeof shape.reserved) || any(shape.row_bytes + kTiles, 16) || any(shape.rows + kTiles, 8))
      fault(i, "#GP: ldtilecfg with reserved bytes that are not 0");
    for (int tile = 0; tile < kTiles; ++tile) {
      const int rows = shape.rows[tile], bytes = shape.row_bytes[tile];
      if (rows > kRows || bytes > kRowBytes) fault(i, "#GP: ldtilecfg with too large a tile");
      if (!rows != !bytes) fault(i, "#GP: ldtilecfg with rows or their bytes 0 but not both");
    }
  } else {
    shape = {};
  }
  state = {};
  state.shape = shape;
}

// A tile that an instruction may name.
int tile(const Instruction& i, int number) {
  if (!state.shape.palette) fault(i, "#UD: a tile with no configuration loaded");
  if (number >= kTiles) fault(i, "#UD: no such tile");
  if (!state.shape.rows[number]) fault(i, "#UD: a tile without rows");
  return number;
}

void move(const Instruction& i, bool store) {
  if (!i.sib) fault(i, "#UD: tileload or tilestore without SIB");
  const int number = tile(i, i.reg), rows = state.shape.rows[number];
  const size_t bytes = state.shape.row_bytes[number];
  for (int row = state.shape.start_row; row < rows; ++row) {
    void* memory = reinterpret_cast<void*>(i.address + static_cast<uintptr_t>(row) * static_cast<uintptr_t>(i.index));
    uint8_t* data = state.tiles[number][row];
    if (store) {
      memcpy(memory, data, bytes);
    } else {
      memset(data, 0, kRowBytes);
      memcpy(data, memory, bytes);
    }
  }
  if (!store) memset(state.tiles[number][rows], 0, static_cast<size_t>(kRows - rows) * kRowBytes);
  state.shape.start_row = 0;
}

template <class A, class B>
void multiply(const Instruction& i) {
  const int c = tile(i, i.reg), a = tile(i, i.rm), b = tile(i, i.vvvv);
  const Shape& shape = state.shape;
  if (c == a || a == b || b == c) fault(i, "#UD: a tile product with the same tile twice");
  if (shape.row_bytes[a] % 4 || shape.row_bytes[b] % 4 || shape.row_bytes[c] % 4)
    fault(i, "#UD: a tile product with rows of no whole number of quads");
  if (shape.rows[a] != shape.rows[c] || shape.row_bytes[b] != shape.row_bytes[c] ||
      shape.row_bytes[a] / 4 != shape.rows[b])
    fault(i, "#UD: a tile product of shapes that do not fit");
  const int depth = shape.row_bytes[a] / 4;
  for (int row = 0; row < shape.rows[c]; ++row) {
    uint32_t sums[kRowBytes / 4];  // unsigned, as they wrap around
    memcpy(sums, state.tiles[c][row], kRowBytes);
    for (int k = 0; k < depth; ++k) {
      A left[4];
      B right[kRowBytes];
      memcpy(left, state.tiles[a][row] + 4 * k, 4);
      memcpy(right, state.tiles[b][k], kRowBytes);
      for (int n = 0; n < kRowBytes / 4; ++n)  // beyond the row's bytes `right` is 0
        sums[n] += static_cast<uint32_t>(left[0] * right[4 * n] + left[1] * right[4 * n + 1] +
                                         left[2] * right[4 * n + 2] + left[3] * right[4 * n + 3]);
    }
    memcpy(state.tiles[c][row], sums, kRowBytes);
  }
  state.shape.start_row = 0;
}

// Does the instruction at the context's position and moves past it; false where it is none of ours.
bool step(ucontext_t* context) {
  greg_t& position = context->uc_mcontext.gregs[REG_RIP];
  Instruction i;
  if (!decode(context, reinterpret_cast<const uint8_t*>(position), i)) return false;
  if (i.opcode != 0x5e && i.vvvv) return false;
  if (i.opcode == 0x49 && i.memory && i.prefix < 2 && i.reg == 0) {
    if (i.prefix == 0) {
      configure(i);
    } else {
      memcpy(reinterpret_cast<void*>(i.address + static_cast<uintptr_t>(i.index)), &state.shape, sizeof(Shape));
    }
  } else if (i.opcode == 0x49 && !i.memory && i.prefix == 3 && i.rm == 0) {
    memset(state.tiles[tile(i, i.reg)], 0, sizeof state.tiles[0]);
    state.shape.start_row = 0;
  } else if (i.opcode == 0x49 && !i.memory && i.prefix == 0 && i.reg == 0 && i.rm == 0) {
    state = {};
  } else if (i.opcode == 0x4b && i.memory && i.prefix) {
    move(i, i.prefix == 2);  // 66 loads with a hint that means nothing here
  } else if (i.opcode == 0x5e && !i.memory) {
    switch (i.prefix) {
      case 0: multiply<uint8_t, uint8_t>(i); break;
      case 1: multiply<uint8_t, int8_t>(i); break;
      case 2: multiply<int8_t, uint8_t>(i); break;
      default: multiply<int8_t, int8_t>(i);
    }
  } else {
    return false;
  }
  position += i.length;
  return true;
}

using Set = int (*)(int, const struct sigaction*, struct sigaction*);

Set set_action() {
  static const Set set = reinterpret_cast<Set>(dlsym(RTLD_NEXT, "sigaction"));
  return set;
}

struct sigaction others;  // what others want with SIGILL: the default at first

void illegal(int number, siginfo_t* info, void* at) {
  auto context = static_cast<ucontext_t*>(at);
  if (step(context)) {
    while (step(context)) {  // the next is often ours too: that saves a signal
    }
    return;
  }
  if (others.sa_flags & SA_SIGINFO) return others.sa_sigaction(number, info, at);
  if (others.sa_handler != SIG_DFL && others.sa_handler != SIG_IGN) return others.sa_handler(number);
  set_action()(SIGILL, &others, nullptr);
  raise(SIGILL);  // waits until this handler has returned
}

__attribute__((constructor)) void install() {
  struct sigaction action {};
  action.sa_sigaction = illegal;
  action.sa_flags = SA_SIGINFO;
  set_action()(SIGILL, &action, &others);
}

}  // namespace

#pragma GCC visibility push(default)

extern "C" int sigaction(int number, const struct sigaction* action, struct sigaction* old) noexcept {
  if (number != SIGILL) return set_action()(number, action, old);
  const struct sigaction before = others;
  if (action) others = *action;
  if (old) *old = before;
  return 0;
}

extern "C" bool shoal_amx_emulated() { return true; }

#pragma GCC visibility pop
