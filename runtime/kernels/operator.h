// What every operator needs of ONNX Runtime: checked inputs, outputs, attributes, its threads, and how it is made known.
#pragma once
#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <thread>

#include "buffers.h"
#include "ort.h"
#include "parallel.h"

namespace shoal {

extern const OrtApi* api;  // of the one ONNX Runtime in the process

template <int Index, class Function, class... Arguments>
auto call(Arguments... arguments) {
  return ort::slot<Index, Function>(api)(arguments...);
}

// Thrown out of a kernel and turned into a status at its edge.
struct Refused {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status) throw Refused{status};
}

[[noreturn]] inline void refuse(const char* what, int64_t a = 0, int64_t b = 0) {
  char text[200];
  std::snprintf(text, sizeof text, what, static_cast<long long>(a), static_cast<long long>(b));
  throw Refused{call<ort::kCreateStatus, ort::CreateStatus>(ort::kInvalidArgument, static_cast<const char*>(text))};
}

struct Tensor {
  uint8_t* data = nullptr;
  int type = ort::kAny;
  int64_t dims[4] = {1, 1, 1, 1};
  size_t rank = 0;
  int64_t count = 0;  // of elements

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  int64_t last() const { return rank ? dims[rank - 1] : 1; }
};

inline Tensor describe(const OrtValue* value) {
  Tensor tensor;
  if (!value) return tensor;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(call<ort::kGetTensorTypeAndShape, ort::GetTensorTypeAndShape>(value, &info));
  OrtStatus* status = call<ort::kGetTensorElementType, ort::GetTensorElementType>(
      const_cast<const OrtTensorTypeAndShapeInfo*>(info), &tensor.type);
  if (!status) status = call<ort::kGetDimensionsCount, ort::GetDimensionsCount>(
      const_cast<const OrtTensorTypeAndShapeInfo*>(info), &tensor.rank);
  if (!status && tensor.rank <= 4) status = call<ort::kGetDimensions, ort::GetDimensions>(
      const_cast<const OrtTensorTypeAndShapeInfo*>(info), static_cast<int64_t*>(tensor.dims), tensor.rank);
  call<ort::kReleaseTensorTypeAndShapeInfo, ort::ReleaseTensorTypeAndShapeInfo>(info);
  check(status);
  if (tensor.rank > 4) refuse("An input has %lld dimensions.", static_cast<int64_t>(tensor.rank));
  tensor.count = 1;
  for (size_t i = 0; i < tensor.rank; ++i) tensor.count *= tensor.dims[i];
  void* data = nullptr;
  check(call<ort::kGetTensorMutableData, ort::GetTensorMutableData>(const_cast<OrtValue*>(value), &data));
  tensor.data = static_cast<uint8_t*>(data);
  static uint8_t nothing;
  if (!tensor.data) tensor.data = &nothing;  // of a tensor without elements
  return tensor;
}

class Context {
 public:
  explicit Context(OrtKernelContext* context) : context_(context) {
    check(call<ort::kGetInputCount, ort::GetInputCount>(const_cast<const OrtKernelContext*>(context), &count_));
  }

  Tensor optional(size_t index) const {
    if (index >= count_) return {};
    const OrtValue* value = nullptr;
    check(call<ort::kGetInput, ort::GetInput>(const_cast<const OrtKernelContext*>(context_), index, &value));
    return describe(value);
  }

  Tensor input(size_t index, int type) const {
    Tensor tensor = optional(index);
    if (!tensor || (type != ort::kAny && tensor.type != type)) refuse("Input %lld is missing or of a wrong type.", index);
    return tensor;
  }

  // A vector of floats of this length, or null.
  const float* vector(size_t index, int64_t length) const {
    Tensor tensor = optional(index);
    if (!tensor) return nullptr;
    if (tensor.type != ort::kFloat || tensor.count != length) refuse("Input %lld is not %lld floats.", index, length);
    return tensor.as<const float>();
  }

  uint8_t* output(size_t index, const int64_t* dims, size_t rank) const {
    OrtValue* value = nullptr;
    check(call<ort::kGetOutput, ort::GetOutput>(context_, index, dims, rank, &value));
    void* data = nullptr;
    check(call<ort::kGetTensorMutableData, ort::GetTensorMutableData>(value, &data));
    return static_cast<uint8_t*>(data);
  }

  // Where the weights are; at least `bytes` of them, aligned as the kernels need.
  const uint8_t* weights(size_t index, int64_t bytes) const {
    Tensor tensor = input(index, ort::kAny);
    const uint8_t* data = tensor.data;
    int64_t have = tensor.count;
    if (tensor.type == ort::kInt64 && tensor.count == 1) {
      Buffer buffer = buffer_of(*tensor.as<int64_t>());
      data = buffer.data;
      have = buffer.bytes;
    } else if (tensor.type != ort::kUint8) {
      refuse("The weights are not bytes.");
    }
    if (!data || have < bytes) refuse("The weights have %lld bytes and need %lld.", data ? have : 0, bytes);
    if (reinterpret_cast<uintptr_t>(data) % 4) refuse("The weights are not aligned.");
    return data;
  }

  Parallel parallel() const {
    static const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    return {threads, context_, [](void* pool, void (*work)(void*, int64_t), void* state, int64_t count) {
              struct Job {
                void (*work)(void*, int64_t);
                void* state;
              } job{work, state};
              auto one = [](void* data, size_t index) {
                auto of = static_cast<Job*>(data);
                of->work(of->state, static_cast<int64_t>(index));
              };
              check(call<ort::kParallelFor, ort::ParallelFor>(
                  static_cast<const OrtKernelContext*>(static_cast<OrtKernelContext*>(pool)),
                  static_cast<void (*)(void*, size_t)>(one), static_cast<size_t>(count), size_t{0},
                  static_cast<void*>(&job)));
            }};
  }

 private:
  OrtKernelContext* context_;
  size_t count_ = 0;
};

inline int64_t integer(const OrtKernelInfo* info, const char* name, int64_t otherwise) {
  int64_t value = otherwise;
  if (OrtStatus* status = call<ort::kAttributeInt64, ort::AttributeInt64>(info, name, &value)) {
    call<ort::kReleaseStatus, ort::ReleaseStatus>(status);
    return otherwise;
  }
  return value;
}

inline float number(const OrtKernelInfo* info, const char* name, float otherwise) {
  float value = otherwise;
  if (OrtStatus* status = call<ort::kAttributeFloat, ort::AttributeFloat>(info, name, &value)) {
    call<ort::kReleaseStatus, ort::ReleaseStatus>(status);
    return otherwise;
  }
  return value;
}

template <class Operator>
struct Registered : OrtCustomOp {
  Registered() : OrtCustomOp{} {
    version = ort::kVersion;
    GetName = [](const OrtCustomOp*) { return Operator::name; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    GetInputType = [](const OrtCustomOp*, size_t index) { return Operator::inputs[index]; };
    GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Operator::inputs); };
    GetOutputType = [](const OrtCustomOp*, size_t index) { return Operator::outputs[index]; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Operator::outputs); };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return index < Operator::required ? ort::kRequired : ort::kOptional;
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ort::kRequired; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
      return guarded([&] { *kernel = new Operator(info); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
      return guarded([&] { static_cast<const Operator*>(kernel)->compute(Context(context)); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Operator*>(kernel); };
  }

  template <class Work>
  static OrtStatus* guarded(Work&& work) {
    try {
      work();
      return nullptr;
    } catch (const Refused& refused) {
      return refused.status;
    } catch (...) {
      return call<ort::kCreateStatus, ort::CreateStatus>(ort::kFail, "Memory ran out.");
    }
  }
};

}  // namespace shoal
