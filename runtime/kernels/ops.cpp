// The operators as ONNX Runtime sees them: domain "shoal", on its threads, over its tensors.
//
// A graph comes from a file, so every shape and attribute is checked against what the kernels assume, at every run.
// Weights are a uint8 tensor, an initializer or an input, or an int64 tensor of one number: the handle of a buffer that
// may change from run to run (buffers.h). A stack of blocks has such a handle too.
#include "attention.h"
#include "isa.h"
#include "linear.h"
#include "operator.h"
#include "ops_experts.h"
#include "stack_path.h"

namespace shoal {

const OrtApi* api;

namespace {

LinearFormat format_of(const OrtKernelInfo* info) {
  LinearFormat format{};
  format.inputs = integer(info, "inputs", 0);
  format.outputs = integer(info, "outputs", 0);
  format.bits = static_cast<int>(std::clamp<int64_t>(integer(info, "bits", 0), 0, 99));
  format.group = integer(info, "group", 0);
  format.span = integer(info, "span", 0);
  format.rotated = integer(info, "rotated", 0) == 1;
  if (!format.valid()) refuse("The weights' format is impossible (%lld inputs, %lld outputs).", format.inputs, format.outputs);
  return format;
}

// What QuantizedLinear and StackedLinear share: all but what multiplies. Inputs: `norm`, then bias and residual, all
// optional.
struct Product {
  int64_t inputs, outputs;
  float epsilon;
  Activation activation;

  Product(const OrtKernelInfo* info, int64_t columns, int64_t rows)
      : inputs(columns), outputs(rows), epsilon(number(info, "epsilon", 0)) {
    int64_t kind = integer(info, "activation", 0);
    if (kind < 0 || kind > 4) refuse("There is no activation %lld.", kind);
    activation = static_cast<Activation>(kind);
    if (kind && outputs % (2 * kPanel)) refuse("%lld outputs cannot be gated.", outputs);
  }

  LinearCall call_of(const Context& context, size_t norm) const {
    Tensor x = context.input(0, ort::kFloat);
    if (!x.rank || x.last() != inputs) refuse("Rows have %lld values, not %lld.", x.last(), inputs);
    const int64_t columns = activation == Activation::none ? outputs : outputs / 2;
    Tensor residual = context.optional(norm + 2);
    LinearCall call{x.count / inputs, x.as<const float>(), nullptr, context.vector(norm, inputs), epsilon,
                    context.vector(norm + 1, outputs), residual.as<const float>(), activation, nullptr};
    if (activation != Activation::none && (call.bias || call.residual)) refuse("A gated product takes neither bias nor residual.");
    if (residual && (residual.type != ort::kFloat || residual.count != call.rows * columns))
      refuse("The residual has %lld values, not %lld.", residual.count, call.rows * columns);
    x.dims[x.rank - 1] = columns;
    call.y = reinterpret_cast<float*>(context.output(0, x.dims, x.rank));
    return call;
  }
};

// y [.., outputs] of x [.., inputs]; inputs: x, weights, norm?, bias?, residual?
struct QuantizedLinear {
  static constexpr const char* name = "QuantizedLinear";
  static constexpr int inputs[] = {ort::kFloat, ort::kAny, ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr size_t required = 2;
  static constexpr int outputs[] = {ort::kFloat};

  LinearFormat format;
  Product product;

  explicit QuantizedLinear(const OrtKernelInfo* info) : format(format_of(info)), product(info, format.inputs, format.outputs) {}

  void compute(const Context& context) const {
    const uint8_t* weights = context.weights(1, format.bytes());
    LinearCall call = product.call_of(context, 2);
    call.weights = weights;
    if (!linear(linear_path(), format, call, context.parallel())) refuse("Memory ran out for %lld rows.", call.rows);
  }
};

// y [.., inputs] of ids [..], input 0, by rows(ids, count, y) on every thread.
template <class Rows>
void rows_of(const Context& context, int64_t inputs, int64_t outputs, Rows&& rows) {
  Tensor ids = context.input(0, ort::kInt64);
  if (ids.rank > 3) refuse("Ids have %lld dimensions.", static_cast<int64_t>(ids.rank));
  const int64_t* at = ids.as<const int64_t>();
  for (int64_t i = 0; i < ids.count; ++i)
    if (at[i] < 0 || at[i] >= outputs) refuse("There is no row %lld of %lld.", at[i], outputs);
  ids.dims[ids.rank] = inputs;
  auto y = reinterpret_cast<float*>(context.output(0, ids.dims, ids.rank + 1));
  const int64_t step = 16;
  context.parallel()((ids.count + step - 1) / step, [&](int64_t item) {
    const int64_t first = item * step;
    rows(at + first, std::min(step, ids.count - first), y + first * inputs);
  });
}

// Rows of a quantised table, y [.., inputs] of ids [..]; inputs: ids, weights.
struct QuantizedRows {
  static constexpr const char* name = "QuantizedRows";
  static constexpr int inputs[] = {ort::kInt64, ort::kAny};
  static constexpr size_t required = 2;
  static constexpr int outputs[] = {ort::kFloat};

  LinearFormat format;
  float factor;

  explicit QuantizedRows(const OrtKernelInfo* info) : format(format_of(info)), factor(number(info, "factor", 1)) {}

  void compute(const Context& context) const {
    const uint8_t* weights = context.weights(1, format.bytes());
    rows_of(context, format.inputs, format.outputs, [&](const int64_t* ids, int64_t count, float* y) {
      linear_rows(format, weights, ids, count, factor, y);
    });
  }
};

// A matrix of a stack, from a handle: the blocks, and the base, that are there now.
struct StackedMatrix {
  StackFormat format;
  int64_t matrix;

  explicit StackedMatrix(const OrtKernelInfo* info)
      : format{integer(info, "inputs", 0), integer(info, "outputs", 0),
               static_cast<int>(std::clamp<int64_t>(integer(info, "rank", 0), 0, 99)), integer(info, "rotated", 0) == 1},
        matrix(integer(info, "matrix", -1)) {
    if (!format.valid()) refuse("A stack's format is impossible (%lld inputs, %lld outputs).", format.inputs, format.outputs);
  }

  // Calls use(weights) with what there is now; input 1 is the stack.
  template <class Use>
  void with_weights(const Context& context, Use&& use) const {
    Tensor handle = context.input(1, ort::kInt64);
    if (handle.count != 1) refuse("There are %lld handles of stacks, not one.", handle.count);
    Payloads payloads;
    if (!stack_of(*handle.as<int64_t>(), matrix, &payloads)) refuse("There is no stack %lld with a matrix %lld.", *handle.as<int64_t>(), matrix);
    for (int i = 0; i < payloads.count; ++i) {
      if (payloads.bytes[i] < format.bytes()) refuse("A block has %lld bytes and needs %lld.", payloads.bytes[i], format.bytes());
      if (reinterpret_cast<uintptr_t>(payloads.blocks[i]) % 4) refuse("A block is not aligned.");
    }
    const LinearFormat base{format.inputs, format.outputs, payloads.bits, payloads.group, payloads.span, format.rotated};
    if (payloads.base.data) {
      if (!base.valid() || payloads.base.bytes < base.bytes()) refuse("The base of the matrix %lld has %lld bytes, too few, or no format.", matrix, payloads.base.bytes);
      if (reinterpret_cast<uintptr_t>(payloads.base.data) % 4) refuse("A base is not aligned.");
    } else if (!payloads.count) {
      refuse("The matrix %lld has neither a base nor a block.", matrix);
    }
    use(StackWeights{&base, payloads.base.data, payloads.blocks, payloads.count});
  }
};

// y [.., outputs] of x [.., inputs]; inputs: x, stack, norm?, bias?, residual?
struct StackedLinear {
  static constexpr const char* name = "StackedLinear";
  static constexpr int inputs[] = {ort::kFloat, ort::kInt64, ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr size_t required = 2;
  static constexpr int outputs[] = {ort::kFloat};

  StackedMatrix stacked;
  Product product;

  explicit StackedLinear(const OrtKernelInfo* info) : stacked(info), product(info, stacked.format.inputs, stacked.format.outputs) {}

  void compute(const Context& context) const {
    stacked.with_weights(context, [&](const StackWeights& weights) {
      LinearCall call = product.call_of(context, 2);
      if (!stack_linear(linear_path(), stack_path(), stacked.format, weights, call, context.parallel()))
        refuse("Memory ran out for %lld rows.", call.rows);
    });
  }
};

// Rows of a stacked table, y [.., inputs] of ids [..]; inputs: ids, stack
struct StackedRows {
  static constexpr const char* name = "StackedRows";
  static constexpr int inputs[] = {ort::kInt64, ort::kInt64};
  static constexpr size_t required = 2;
  static constexpr int outputs[] = {ort::kFloat};

  StackedMatrix stacked;
  float factor;

  explicit StackedRows(const OrtKernelInfo* info) : stacked(info), factor(number(info, "factor", 1)) {}

  void compute(const Context& context) const {
    stacked.with_weights(context, [&](const StackWeights& weights) {
      rows_of(context, stacked.format.inputs, stacked.format.outputs, [&](const int64_t* ids, int64_t count, float* y) {
        stack_rows(stacked.format, weights, ids, count, factor, y);
      });
    });
  }
};

// Attention over a cache in place; inputs: qkv, keys, values, last, total (for GroupQueryAttention, which lower.py makes of
// this; unused), cos, sin, q_norm?, k_norm?, k_scale?, v_scale?; outputs: y, keys, values, which are bound to the same memory (else the cache is copied).
template <int Cache>
struct CachedAttention {
  static constexpr const char* name = "CachedAttention";
  static constexpr int inputs[] = {ort::kFloat, Cache,       Cache,       ort::kInt32, ort::kInt32, ort::kFloat,
                                   ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr size_t required = 7;
  static constexpr int outputs[] = {ort::kFloat, Cache, Cache};

  AttentionShape shape{};

  explicit CachedAttention(const OrtKernelInfo* info) {
    shape.heads = integer(info, "heads", 0);
    shape.kv_heads = integer(info, "kv_heads", 0);
    shape.window = integer(info, "window", 0);
    shape.fast = integer(info, "fast", 0) == 1;
    shape.scale = number(info, "scale", 1);
    shape.epsilon = number(info, "epsilon", 0);
    if (shape.kv_heads < 1 || shape.heads < shape.kv_heads || shape.heads > 4096 || shape.heads % shape.kv_heads ||
        shape.window < 0)
      refuse("%lld heads cannot share %lld.", shape.heads, shape.kv_heads);
  }

  void compute(const Context& context) const {
    AttentionShape s = shape;
    Tensor qkv = context.input(0, ort::kFloat), keys = context.input(1, Cache), values = context.input(2, Cache);
    Tensor last = context.input(3, ort::kInt32), cos = context.input(5, ort::kFloat), sin = context.input(6, ort::kFloat);
    if (qkv.rank != 3 || keys.rank != 4 || values.rank != 4 ||
        std::memcmp(keys.dims, values.dims, sizeof keys.dims))
      refuse("The cache or its rows have another shape.");
    const int64_t batch = qkv.dims[0], length = qkv.dims[1];
    s.head_dim = keys.dims[3];
    s.capacity = keys.dims[2];
    s.pairs = cos.last();
    s.cache = Cache == ort::kFloat ? CacheType::f32 : Cache == ort::kFloat16 ? CacheType::f16 : CacheType::i8;
    if (keys.dims[0] != batch || keys.dims[1] != s.kv_heads || s.head_dim < 2 || s.head_dim % 2 || s.head_dim > 512 ||
        qkv.dims[2] != (s.heads + 2 * s.kv_heads) * s.head_dim)
      refuse("The cache or its rows have another shape.");
    if (cos.rank != 2 || sin.rank != 2 || cos.dims[0] != sin.dims[0] || cos.dims[1] != sin.dims[1] ||
        2 * s.pairs > s.head_dim)
      refuse("The rotary tables have another shape.");
    if (last.count != batch) refuse("There are %lld last positions, not %lld.", last.count, batch);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t at = last.as<const int32_t>()[b];
      if (at + 1 < length || at >= s.capacity || at >= cos.dims[0]) refuse("The last position is %lld of %lld.", at, s.capacity);
    }
    AttentionCall call{};
    call.batch = batch;
    call.length = length;
    call.last = last.as<const int32_t>();
    call.qkv = qkv.as<const float>();
    call.cos = cos.as<const float>();
    call.sin = sin.as<const float>();
    call.q_norm = context.vector(7, s.head_dim);
    call.k_norm = context.vector(8, s.head_dim);
    call.k_scale = context.vector(9, s.kv_heads * s.head_dim);
    call.v_scale = context.vector(10, s.kv_heads * s.head_dim);
    if (s.cache == CacheType::i8 && (!call.k_scale || !call.v_scale)) refuse("The cache has no scales.");
    int64_t dims[3] = {batch, length, s.heads * s.head_dim};
    call.out = reinterpret_cast<float*>(context.output(0, dims, 3));
    const size_t bytes = static_cast<size_t>(keys.count) * (s.cache == CacheType::f32 ? 4 : s.cache == CacheType::f16 ? 2 : 1);
    call.keys = in_place(context, 1, keys, bytes);
    call.values = in_place(context, 2, values, bytes);
    if (!attention(attention_path(), s, call, context.parallel())) refuse("Memory ran out for %lld positions.", length);
  }

  static void* in_place(const Context& context, size_t index, const Tensor& past, size_t bytes) {
    uint8_t* present = context.output(index, past.dims, past.rank);
    if (present != past.data) std::memcpy(present, past.data, bytes);
    return present;
  }
};

}  // namespace
}  // namespace shoal

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                              const OrtApiBase* base) {
  using namespace shoal;
  static Registered<QuantizedLinear> linear;
  static Registered<QuantizedRows> rows;
  static Registered<StackedLinear> stacked;
  static Registered<StackedRows> stacked_rows;
  static Registered<CachedAttention<ort::kFloat>> attention;  // one name: the engine chooses by type
  static Registered<CachedAttention<ort::kFloat16>> attention_f16;
  static Registered<CachedAttention<ort::kInt8>> attention_i8;
  static OrtCustomOpDomain* domain = nullptr;
  api = base->GetApi(ort::kVersion);
  if (!api) {  // an older engine: it can still say so
    const OrtApi* old = base->GetApi(1);
    return ort::slot<ort::kCreateStatus, ort::CreateStatus>(old)(ort::kFail, "shoal's operators need ONNX Runtime 1.24 or later.");
  }
  static OrtStatus* made = [&]() -> OrtStatus* {
    if (OrtStatus* status = call<ort::kCreateCustomOpDomain, ort::CreateCustomOpDomain>("shoal", &domain)) return status;
    for (const OrtCustomOp* op : {static_cast<const OrtCustomOp*>(&linear), static_cast<const OrtCustomOp*>(&rows),
                                  static_cast<const OrtCustomOp*>(&stacked), static_cast<const OrtCustomOp*>(&stacked_rows),
                                  static_cast<const OrtCustomOp*>(&attention), static_cast<const OrtCustomOp*>(&attention_f16),
                                  static_cast<const OrtCustomOp*>(&attention_i8), experts_operator(), route_experts_operator()})
      if (OrtStatus* status = call<ort::kCustomOpDomainAdd, ort::CustomOpDomainAdd>(domain, op)) return status;
    return nullptr;
  }();
  if (made) return call<ort::kCreateStatus, ort::CreateStatus>(ort::kFail, "shoal's operators could not be registered.");
  return call<ort::kAddCustomOpDomain, ort::AddCustomOpDomain>(options, domain);
}
