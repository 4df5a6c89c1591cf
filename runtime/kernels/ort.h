// The part of ONNX Runtime's C interface that operators need, declared anew: its wheel ships no headers. Functions of
// the interface are reached by their index, which never changes; the struct of a custom operator is version 24's.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtApi;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShape)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

}  // extern "C"

namespace shoal::ort {

constexpr uint32_t kVersion = 24;
enum Type { kAny = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kFloat16 = 10 };
constexpr int kRequired = 0, kOptional = 1;
enum { kFail = 1, kInvalidArgument = 2 };

// The function at an index of the interface.
template <int Index, class Function>
Function* slot(const OrtApi* api) {
  return reinterpret_cast<Function* const*>(api)[Index];
}

using CreateStatus = OrtStatus*(int, const char*);
using CreateCustomOpDomain = OrtStatus*(const char*, OrtCustomOpDomain**);
using CustomOpDomainAdd = OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*);
using AddCustomOpDomain = OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*);
using GetTensorMutableData = OrtStatus*(OrtValue*, void**);
using GetTensorElementType = OrtStatus*(const OrtTensorTypeAndShapeInfo*, int*);
using GetDimensionsCount = OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*);
using GetDimensions = OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t);
using GetTensorTypeAndShape = OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**);
using ReleaseTensorTypeAndShapeInfo = void(OrtTensorTypeAndShapeInfo*);
using AttributeFloat = OrtStatus*(const OrtKernelInfo*, const char*, float*);
using AttributeInt64 = OrtStatus*(const OrtKernelInfo*, const char*, int64_t*);
using GetInputCount = OrtStatus*(const OrtKernelContext*, size_t*);
using GetInput = OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**);
using GetOutput = OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**);
using ParallelFor = OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
using ReleaseStatus = void(OrtStatus*);

enum Slot {
  kCreateStatus = 0, kCreateCustomOpDomain = 26, kCustomOpDomainAdd = 27, kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51, kGetTensorElementType = 60, kGetDimensionsCount = 61, kGetDimensions = 62,
  kGetTensorTypeAndShape = 65, kAttributeFloat = 85, kAttributeInt64 = 86, kGetInputCount = 88, kGetInput = 90,
  kGetOutput = 91, kReleaseStatus = 93, kReleaseTensorTypeAndShapeInfo = 99, kParallelFor = 274,
};

}  // namespace shoal::ort
