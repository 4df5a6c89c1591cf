// The operators of ops_experts.cpp, for ops.cpp to make known.
#pragma once
#include "ort.h"

namespace shoal {

const OrtCustomOp* experts_operator();
const OrtCustomOp* route_experts_operator();

}  // namespace shoal
