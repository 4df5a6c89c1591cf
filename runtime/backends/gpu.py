"""The gpu backend: NVIDIA's cards through CUDA, any card through WebGPU (Vulkan, Metal or D3D12), Intel's through
OpenVINO. Rules here were measured with the WebGPU plugin 0.4.0; of the others only what holds for all is said."""

from collections.abc import Mapping

from ..providers import Listed
from .provider import UNKNOWN, Operator, Provider, Verdict, elsewhere

NAME = "gpu"
PROVIDERS = (
    Provider(
        "cuda", "CUDAExecutionProvider", ("gpu", ""), "onnxruntime-gpu", needs="an NVIDIA card, its driver and CUDA"
    ),
    Provider(
        "webgpu", "WebGpuExecutionProvider", ("gpu", "cpu"), "onnxruntime-ep-webgpu", "onnxruntime_ep_webgpu",
        "a card with Vulkan, Metal or D3D12; with ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1 a software one will do",
    ),
    Provider(
        "openvino", "OpenVINOExecutionProvider", ("gpu",), "onnxruntime-ep-openvino", "onnxruntime_ep_openvino",
        "an Intel GPU and its compute driver",
    ),
)  # fmt: skip


def settings(provider: str, listed: Listed) -> Mapping[str, str]:
    """How the provider is set."""
    return {"device_type": "GPU"} if provider == "openvino" and not listed.kind else {}


def simulated(provider: str, listed: Listed) -> str:
    """What stands in for a card, where there is none."""
    return "a software adapter on the cpu" if provider == "webgpu" and listed.kind == "cpu" else ""


def supports(provider: str, operator: Operator) -> Verdict:
    """What is known before the provider is asked."""
    if (verdict := elsewhere(operator)) is not None:
        return verdict
    if provider != "webgpu":
        return UNKNOWN
    if operator.op == "QMoE":
        why = "its QMoE gave wrong results (relative error up to 0.7 where tried)"
        return Verdict(False, why, "Say experts as MatMulNBits", broken=True)
    if operator.op == "MultiHeadAttention" and any(operator.inputs[4:5]):
        why = "WebGPU's MultiHeadAttention stops at an input key_padding_mask"
        return Verdict(False, why, "Say the mask as attention_bias, or run it on the cpu", broken=True)
    if operator.op in ("MatMulInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QLinearMatMul"):
        why = f"WebGPU has no {operator.op}: no integer matrices"
        return Verdict(False, why, "Convert to weights in integers with float activations (MatMulNBits)")
    if "float64" in operator.types:
        return Verdict(False, "WebGPU has no float64", "Convert in float32")
    return UNKNOWN
