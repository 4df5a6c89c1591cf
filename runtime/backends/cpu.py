"""The cpu backend: ONNX Runtime's own provider and shoal's kernels beside it; always there."""

from collections.abc import Mapping

from .. import kernels
from ..providers import CPU, Listed
from .provider import OURS, UNKNOWN, Operator, Provider, Verdict

NAME = "cpu"
PROVIDERS = (Provider("onnxruntime", CPU, ("cpu",), "onnxruntime"),)


def settings(provider: str, listed: Listed) -> Mapping[str, str]:
    return {}


def simulated(provider: str, listed: Listed) -> str:
    return ""


def supports(provider: str, operator: Operator) -> Verdict:
    """The CPU takes every operator of ONNX, but bfloat16 in none and ours only where the library was built."""
    if operator.domain == OURS:
        if operator.op not in kernels.OPERATORS:
            return Verdict(False, f"{operator.op} is no operator of this version's kernels", "Install a newer shoal")
        if not kernels.available():
            return Verdict(False, f"shoal's kernels are not there: {kernels.missing()}", "Load with kernels='ort'")
        return Verdict(True)
    if "bfloat16" in operator.types:
        return Verdict(False, "ONNX Runtime computes nothing in bfloat16 on the cpu", "Convert in float16 or float32")
    return UNKNOWN
