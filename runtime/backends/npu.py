"""The npu backend: Qualcomm's Hexagon through QNN, Intel's through OpenVINO, Apple's Neural Engine through CoreML.

On x86 QNN's library emulates the Hexagon's matrix processor (HTP), numerics of an architecture included: graphs can
be compiled and checked there, at a thousandth of the speed. Rules here were measured with QNN 2.51 (onnxruntime-qnn
2.7.0).
"""

import platform
from collections.abc import Mapping

from ..providers import Listed
from .provider import UNKNOWN, Operator, Provider, Verdict, elsewhere

NAME = "npu"
PROVIDERS = (
    Provider(
        "qnn", "QNNExecutionProvider", ("npu", "cpu"), "onnxruntime-qnn", "onnxruntime_qnn",
        "a Qualcomm processor with a Hexagon; on x86 it is emulated",
    ),
    Provider(
        "openvino", "OpenVINOExecutionProvider", ("npu",), "onnxruntime-ep-openvino", "onnxruntime_ep_openvino",
        "an Intel Core Ultra and its NPU driver",
    ),
    Provider(
        "coreml", "CoreMLExecutionProvider", ("npu", ""), needs="macOS or iOS on Apple silicon"
    ),
)  # fmt: skip
# An emulator has no SoC to find: the Snapdragon 8 Gen 3's (SM8650) and its architecture. The first session's sticks for
# the whole process, so it is one for all.
EMULATED = {"htp_arch": "75", "soc_model": "57"}
_X86 = ("x86_64", "AMD64", "i386", "i686")
_CONTROL = ("Loop", "Scan", "SequenceMap")
# ONNX Runtime's own operators that QNN lacks, and what says the same in operators that it has
_INSTEAD = {
    "MatMulInteger": "QuantizeLinear and DequantizeLinear around MatMul",
    "DynamicQuantizeMatMul": "QuantizeLinear and DequantizeLinear around MatMul, with static scales",
    "DynamicQuantizeLinear": "QuantizeLinear with a static scale",
    "SkipSimplifiedLayerNormalization": "Add and SimplifiedLayerNormalization",
    "SkipLayerNormalization": "Add and LayerNormalization",
    "GroupQueryAttention": "Attention of opset 23, or attention on the cpu",
}  # fmt: skip


def settings(provider: str, listed: Listed) -> Mapping[str, str]:
    """How the provider is set."""
    if provider == "qnn":
        # Inputs and outputs in integers are part of the graph: two subgraphs meet there without the cpu
        said = {"backend_type": "htp", "offload_graph_io_quantization": "0"}
        return said | (EMULATED if simulated(provider, listed) else {})
    if provider == "coreml":
        return {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndNeuralEngine", "RequireStaticInputShapes": "1"}
    return {}


def simulated(provider: str, listed: Listed) -> str:
    """What stands in for a neural processor, where there is none."""
    # Linux lists a Hexagon as the CPU beside it, so the processor decides
    return "QNN's HTP emulator" if provider == "qnn" and platform.machine() in _X86 and listed.kind != "npu" else ""


def supports(provider: str, operator: Operator) -> Verdict:
    """What is known before the provider is asked."""
    if (verdict := elsewhere(operator)) is not None:
        return verdict
    if operator.op in _CONTROL:
        why = f"a neural processor runs no {operator.op}: what runs must not depend on values"
        return Verdict(False, why, "Cut the graph around it")
    if provider == "qnn" and (verdict := _qnn(operator)) is not None:
        return verdict
    if not operator.static:
        why = "a neural processor knows static shapes only, and a dimension here is open"
        return Verdict(False, why, "Give the open dimensions a length (dims), such as a chunk's")
    return UNKNOWN


def _qnn(operator: Operator) -> Verdict | None:
    if operator.op in _INSTEAD:
        return Verdict(False, f"QNN has no {operator.op}", f"Convert to {_INSTEAD[operator.op]}")
    if (operator.op, operator.domain) == ("RotaryEmbedding", "com.microsoft"):
        why = "QNN knows RotaryEmbedding of ONNX (opset 23), not com.microsoft's"
        return Verdict(False, why, "Convert to RotaryEmbedding of opset 23, or rotate on the cpu")
    if "float64" in operator.types:
        return Verdict(False, "the HTP has no float64", "Convert in float32")
    return None
